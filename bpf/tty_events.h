/* SPDX-License-Identifier: (GPL-2.0-only OR MIT) */
/* Part of events.h, whose rules hold: what the iterators tell of pseudo-terminals. */
#ifndef TRACKER_TTY_EVENTS_H
#define TRACKER_TTY_EVENTS_H

/* tty_side.flags */
enum tty_flag {
	TTYF_EXCLUSIVE = 1,      /* TIOCEXCL */
	TTYF_OTHER_CLOSED = 2,   /* the other side was open and is not any more */
	TTYF_LOCKED = 4,         /* TIOCSPTLCK, of a master */
	TTYF_STOPPED = 8,        /* output is stopped */
	TTYF_TCO_STOPPED = 16,   /* by TCXONC */
	TTYF_PACKET = 32,        /* TIOCPKT, of a master */
	TTYF_LNEXT = 64,         /* the next character is to be taken literally */
	TTYF_ERASING = 128,      /* in the middle of an erasure on a printing terminal */
	TTYF_PUSH = 256,         /* what was typed before canonical mode came on is to be read */
	TTYF_ECHO_PENDING = 512, /* echoes wait for the output */
	TTYF_BUSY = 1024,        /* a worker is about to move bytes into the line discipline */
	TTYF_FLAGGED = 2048,     /* some bytes in the flip buffers have a flag of their own */
};

#define TRK_TTY_BUF 4096 /* N_TTY_BUF_SIZE */
#define TRK_TERMIOS_LEN 44

/* One side of a pseudo-terminal. Positions count bytes since the line discipline was opened;
 * read_buf is a ring of TRK_TTY_BUF bytes. */
struct tty_side {
	__u64 tty; /* struct tty_struct */
	__u64 read_head;
	__u64 canon_head;
	__u64 read_tail;
	__u32 flags;      /* enum tty_flag */
	__s32 count;      /* of open files; the slave's is one more while the master is open */
	__u32 discipline; /* N_TTY is 0 */
	__u32 session;    /* that it is the controlling terminal of, 0 if none */
	__u32 pgrp;       /* foreground process group */
	__u32 pktstatus;  /* TIOCPKT_* that the master has not read */
	__u32 column;
	__u32 canon_column;
	__u32 flip;         /* bytes that wait in front of the line discipline */
	__u32 flip_buffers; /* that they are in */
	__u32 locked;       /* non-zero if TIOCSLCKTRMIOS locks anything */
	__u16 rows;
	__u16 columns;
	__u16 xpixel;
	__u16 ypixel;
	__u8 termios[TRK_TERMIOS_LEN]; /* struct ktermios, which is struct termios2 */
	__u32 pad;
};
TRK_ASSERT_SIZE(struct tty_side, 136);

/* A pseudo-terminal, seen from either end. */
struct tty_rec {
	struct rec_hdr hdr;
	__u32 is_master; /* the open file is the master */
	__u32 hung_up;   /* the open file was hung up */
	__u32 index;
	__u32 uid; /* of the slave's device file */
	__u32 gid;
	__u32 mode;
	struct tty_side master;
	struct tty_side slave;
};
TRK_ASSERT_SIZE(struct tty_rec, 304);

enum tty_part {
	TTYP_READ_BUF = 0,
	TTYP_READ_FLAGS = 1, /* bit n: byte n of read_buf ends a line */
	TTYP_FLIP = 2,       /* in order */
};

#define TRK_TTY_CHUNK 1024

/* Bytes in a terminal that were not read. */
struct tty_data_rec {
	struct rec_hdr hdr;
	__u64 tty;  /* struct tty_struct that they are read from */
	__u32 part; /* enum tty_part */
	__u32 len;  /* valid bytes */
	__u8 data[TRK_TTY_CHUNK];
};
TRK_ASSERT_SIZE(struct tty_data_rec, 1048);

#endif
