// SPDX-License-Identifier: (GPL-2.0-only OR MIT)
/*
 * The hooks that keep the model: few, on the functions inside the kernel that change
 * state. User space chooses which of them to load by what the running kernel has.
 */
#include "common.bpf.h"

#define CLONE_FS 0x00000200
#define CLONE_FILES 0x00000400
#define CLONE_NEWNS 0x00020000
#define CLONE_PIDFD 0x00001000

char LICENSE[] SEC("license") = "Dual MIT/GPL";

#include "track_ring.bpf.h"
#include "track_task.bpf.h"
#include "track_socket.bpf.h"
#include "track_file.bpf.h"
#include "track_enter.bpf.h"
#include "track_epoll.bpf.h"
#include "track_inotify.bpf.h"
#include "track_attrs.bpf.h"
#include "track_mm.bpf.h"
#include "track_marks.bpf.h"
