// SPDX-License-Identifier: (GPL-2.0-only OR MIT)
/* Loaded only to learn whether this kernel accepts fentry programs: some refuse them
 * whatever their BTF says, by lockdown, by policy or for want of ftrace. */
#include "common.bpf.h"

char LICENSE[] SEC("license") = "Dual MIT/GPL";

SEC("fentry/fd_install")
int probe_fentry(void *ctx)
{
	return 0;
}
