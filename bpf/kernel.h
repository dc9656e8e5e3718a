/* SPDX-License-Identifier: (GPL-2.0-only OR MIT) */
/*
 * The kernel types and fields the BPF programs use, and no others. Layouts here
 * are placeholders: preserve_access_index makes libbpf relocate every access to
 * the running kernel's own layout, found in its BTF. A field that exists only on
 * some kernels is guarded with bpf_core_field_exists() where it is used; a type
 * that changed has a second declaration with a ___suffix, which CO-RE ignores.
 */
#ifndef TRACKER_KERNEL_H
#define TRACKER_KERNEL_H

#include <linux/types.h>
#include <linux/bpf.h>

typedef __u8 u8;
typedef __u16 u16;
typedef __u32 u32;
typedef __u64 u64;
typedef __s16 s16;
typedef __s32 s32;
typedef __s64 s64;
typedef _Bool bool;
#define true 1
#define false 0
#define NULL ((void *)0)

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)

typedef struct {
	int counter;
} atomic_t;
typedef struct {
	s64 counter;
} atomic64_t;
typedef struct {
	long counter;
} atomic_long_t;
typedef struct {
	u32 val;
} kuid_t;
typedef struct {
	u32 val;
} kgid_t;
typedef struct {
	u64 val;
} kernel_cap_t;
typedef struct {
	unsigned long sig[1];
} sigset_t;

struct timespec64 {
	s64 tv_sec;
};
struct list_head {
	struct list_head *next;
};
struct hlist_node {
	struct hlist_node *next;
};
struct hlist_head {
	struct hlist_node *first;
};
struct rb_node {
	unsigned long __rb_parent_color;
	struct rb_node *rb_right;
	struct rb_node *rb_left;
};
struct rb_root {
	struct rb_node *rb_node;
};
struct rb_root_cached {
	struct rb_root rb_root;
};

#pragma clang attribute pop

#include "kernel_task.h"
#include "kernel_file.h"
#include "kernel_net.h"
#include "kernel_tty.h"
#include "kernel_mqueue.h"
#include "kernel_raw.h"

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)

/* Iterators */
struct seq_file;
struct bpf_iter_meta {
	struct seq_file *seq;
	u64 session_id;
	u64 seq_num;
};
struct bpf_iter__task {
	struct bpf_iter_meta *meta;
	struct task_struct *task;
};
struct bpf_iter__task_file {
	struct bpf_iter_meta *meta;
	struct task_struct *task;
	u32 fd;
	struct file *file;
};
struct bpf_iter__tcp {
	struct bpf_iter_meta *meta;
	struct sock_common *sk_common;
};
struct bpf_iter__task_vma {
	struct bpf_iter_meta *meta;
	struct task_struct *task;
	struct vm_area_struct *vma;
};

/* System calls, for the hooks that have nothing better than their exit */
struct pt_regs {
	unsigned long r10;
	unsigned long r8;
	unsigned long dx;
	unsigned long si;
	unsigned long di;
	unsigned long orig_ax;
};

#pragma clang attribute pop

#endif
