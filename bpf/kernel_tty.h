/* SPDX-License-Identifier: (GPL-2.0-only OR MIT) */
/* Part of kernel.h, which explains it: terminals. */
#ifndef TRACKER_KERNEL_TTY_H
#define TRACKER_KERNEL_TTY_H

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)

struct winsize {
	u16 ws_row;
	u16 ws_col;
	u16 ws_xpixel;
	u16 ws_ypixel;
};
struct ktermios {
	u32 c_iflag;
};
struct mutex {
	atomic_long_t owner;
};
struct work_struct {
	atomic_long_t data;
};
struct tty_buffer {
	struct tty_buffer *next;
	unsigned int commit;
	unsigned int read;
	bool flags; /* see has_flags() */
	u8 data[0];
};
struct tty_bufhead {
	struct tty_buffer *head;
	struct work_struct work;
	struct mutex lock;
};
struct tty_port {
	struct tty_bufhead buf;
};
struct tty_ldisc_ops {
	int num;
};
struct tty_ldisc {
	struct tty_ldisc_ops *ops;
};
/* drivers/tty/n_tty.c */
struct n_tty_data {
	unsigned long read_head;
	unsigned long canon_head;
	unsigned long echo_head;
	unsigned char lnext : 1;
	unsigned char erasing : 1;
	unsigned char push : 1;
	char read_buf[TRK_TTY_BUF];
	unsigned long read_flags[TRK_TTY_BUF / 64];
	unsigned long read_tail;
	unsigned int column;
	unsigned int canon_column;
	unsigned long echo_tail;
};
struct tty_struct {
	int index;
	unsigned long flags;
	int count;
	struct tty_ldisc *ldisc;
	struct ktermios termios;
	struct ktermios termios_locked;
	struct winsize winsize;
	struct {
		bool stopped;
		bool tco_stopped;
	} flow;
	struct {
		struct pid *pgrp;
		struct pid *session;
		unsigned char pktstatus;
		bool packet;
	} ctrl;
	struct tty_struct *link;
	struct tty_port *port;
	void *disc_data;
	void *driver_data;
};
struct tty_file_private {
	struct tty_struct *tty;
};
/* #defines before 6.15, with the values of iter_tty.bpf.h */
enum tty_struct_flags {
	TTY_OTHER_CLOSED = 2,
	TTY_EXCLUSIVE = 3,
	TTY_PTY_LOCK = 16,
};

#pragma clang attribute pop

#endif
