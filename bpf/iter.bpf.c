// SPDX-License-Identifier: (GPL-2.0-only OR MIT)
/*
 * Iterators that read the state of all watched processes in one pass each: tasks,
 * descriptors, mappings. They need no agent and change nothing. User space chooses
 * by the variables below what a pass reports; records travel through the iterator's
 * own seq_file, except those of which one object can have more than fit its 32 KiB
 * buffer (epoll items, watches, timers, AIO contexts, adjustments of semaphores, locks,
 * bytes of terminals, messages, connections to accept): they go to the side ring.
 */
#include "common.bpf.h"

char LICENSE[] SEC("license") = "Dual MIT/GPL";

#include "iter_vars.bpf.h"
#include "iter_aio.bpf.h"
#include "iter_sem.bpf.h"
#include "iter_uring.bpf.h"
#include "iter_pressure.bpf.h"
#include "iter_timer.bpf.h"
#include "iter_attrs.bpf.h"
#include "iter_regs.bpf.h"
#include "iter_task.bpf.h"
#include "iter_socket.bpf.h"
#include "iter_sets.bpf.h"
#include "iter_tty.bpf.h"
#include "iter_window.bpf.h"
#include "iter_mqueue.bpf.h"
#include "iter_accept.bpf.h"
#include "iter_orphan.bpf.h"
#include "iter_hints.bpf.h"
#include "iter_file.bpf.h"
#include "iter_vma.bpf.h"
