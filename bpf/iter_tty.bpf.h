/* SPDX-License-Identifier: (GPL-2.0-only OR MIT) */
/*
 * Pseudo-terminals. Nothing but the kernel's own memory shows what is queued in one without
 * taking it out: there is no peeking at a terminal, and what is put back goes through the line
 * discipline again.
 */

#define PTMX_DEV (5 << 20 | 2) /* /dev/ptmx */
#define PTS_MAJOR 136          /* UNIX98_PTY_SLAVE_MAJOR */
/* A buffer takes at least 256 of the 8 KiB of one direction, of which the last may overshoot. */
#define MAX_FLIP_BUFFERS 128
/* A flip buffer holds half a page at most, see TTY_BUFFER_PAGE. */
#define MAX_FLIP_CHUNKS 4
#define FLIP_CHUNK (TRK_TTY_CHUNK - 1) /* bytes, also as a mask */
#define WORK_STRUCT_PENDING 1

struct tty_rec out_tty;
struct tty_data_rec out_tty_data;

struct {
	u64 buffer;
	u64 tty; /* whose bytes are written out, 0 while counting */
	u32 bytes;
	u32 buffers;
	u32 flagged;
	u32 failed;
} flip_walk;

/* Flags are bit numbers; since 6.15 they are counted by an enum. */
#define TTY_BIT(flags, name)                                                                       \
	((flags) >> (bpf_core_enum_value_exists(enum tty_struct_flags, name)                       \
			     ? bpf_core_enum_value(enum tty_struct_flags, name)                    \
			     : name) &                                                             \
	 1)

/* `len` must be bounded where the verifier can see it. */
static __always_inline bool write_tty_data(u64 tty, u32 part, u64 from, u64 len)
{
	struct tty_data_rec *r = &out_tty_data;

	r->hdr.kind = REC_TTY_DATA;
	r->hdr.size = sizeof(*r);
	r->tty = tty;
	r->part = part;
	r->len = len;
	bpf_probe_read_kernel(r->data, len, (void *)from);
	return side_write(r, sizeof(*r));
}

/* An int with TTYB_NORMAL for "none" in it, up to 6.1; then a bool for "some". */
static __always_inline bool has_flags(struct tty_buffer *buffer)
{
	bool flags = BPF_CORE_READ(buffer, flags);

	return bpf_core_field_size(buffer->flags) == sizeof(int) ? !flags : flags;
}

static long flip_step(u64 index, void *ctx)
{
	struct tty_buffer *buffer = (void *)flip_walk.buffer;
	u64 data = (u64)buffer + bpf_core_field_offset(struct tty_buffer, data);
	u32 read, commit;

	if (!buffer)
		return 1;
	read = BPF_CORE_READ(buffer, read);
	commit = BPF_CORE_READ(buffer, commit);
	if (commit > read) {
		flip_walk.bytes += commit - read;
		if (has_flags(buffer))
			flip_walk.flagged = 1;
		for (int i = 0; flip_walk.tty && i < MAX_FLIP_CHUNKS; i++) {
			u64 len = commit - read;

			if (read >= commit)
				break;
			if (len > FLIP_CHUNK)
				len = FLIP_CHUNK;
			/* Linux 6.1 forgets the bound of a word that it spills. */
			barrier_var(len);
			len &= FLIP_CHUNK;
			if (!write_tty_data(flip_walk.tty, TTYP_FLIP, data + read, len)) {
				flip_walk.failed = 1;
				return 1;
			}
			read += FLIP_CHUNK;
		}
	}
	flip_walk.buffers++;
	flip_walk.buffer = (u64)BPF_CORE_READ(buffer, next);
	return 0;
}

static __always_inline void walk_flip(struct tty_struct *tty, bool write)
{
	flip_walk.buffer = (u64)BPF_CORE_READ(tty, port, buf.head);
	flip_walk.tty = write ? (u64)tty : 0;
	flip_walk.bytes = 0;
	flip_walk.buffers = 0;
	flip_walk.flagged = 0;
	flip_walk.failed = 0;
	bpf_loop(MAX_FLIP_BUFFERS, flip_step, NULL, 0);
}

static __always_inline void fill_tty_side(struct tty_side *s, struct tty_struct *tty)
{
	struct n_tty_data *ldata = BPF_CORE_READ(tty, disc_data);
	u64 flags = BPF_CORE_READ(tty, flags);
	u64 work = BPF_CORE_READ(tty, port, buf.work.data.counter);
	u64 owner = BPF_CORE_READ(tty, port, buf.lock.owner.counter);
	u64 locked[6] = {};

	s->tty = (u64)tty;
	s->flags = 0;
	/* first: whatever moves bytes has ended before they are looked at, or is seen here */
	if (work & WORK_STRUCT_PENDING || owner)
		s->flags |= TTYF_BUSY;
	if (TTY_BIT(flags, TTY_EXCLUSIVE))
		s->flags |= TTYF_EXCLUSIVE;
	if (TTY_BIT(flags, TTY_OTHER_CLOSED))
		s->flags |= TTYF_OTHER_CLOSED;
	if (TTY_BIT(flags, TTY_PTY_LOCK))
		s->flags |= TTYF_LOCKED;
	if (BPF_CORE_READ(tty, flow.stopped))
		s->flags |= TTYF_STOPPED;
	if (BPF_CORE_READ(tty, flow.tco_stopped))
		s->flags |= TTYF_TCO_STOPPED;
	if (BPF_CORE_READ(tty, ctrl.packet))
		s->flags |= TTYF_PACKET;
	s->count = BPF_CORE_READ(tty, count);
	s->discipline = BPF_CORE_READ(tty, ldisc, ops, num);
	s->session = pid_nr(BPF_CORE_READ(tty, ctrl.session));
	s->pgrp = pid_nr(BPF_CORE_READ(tty, ctrl.pgrp));
	s->pktstatus = BPF_CORE_READ(tty, ctrl.pktstatus);
	s->rows = BPF_CORE_READ(tty, winsize.ws_row);
	s->columns = BPF_CORE_READ(tty, winsize.ws_col);
	s->xpixel = BPF_CORE_READ(tty, winsize.ws_xpixel);
	s->ypixel = BPF_CORE_READ(tty, winsize.ws_ypixel);
	bpf_probe_read_kernel(s->termios, TRK_TERMIOS_LEN,
			      (void *)tty + bpf_core_field_offset(struct tty_struct, termios));
	bpf_probe_read_kernel(locked, TRK_TERMIOS_LEN,
			      (void *)tty +
				      bpf_core_field_offset(struct tty_struct, termios_locked));
	s->locked = (locked[0] | locked[1] | locked[2] | locked[3] | locked[4] | locked[5]) != 0;
	walk_flip(tty, false);
	s->flip = flip_walk.bytes;
	s->flip_buffers = flip_walk.buffers;
	if (flip_walk.flagged)
		s->flags |= TTYF_FLAGGED;
	s->read_head = 0;
	s->canon_head = 0;
	s->read_tail = 0;
	s->column = 0;
	s->canon_column = 0;
	if (s->discipline || !ldata)
		return;
	s->read_head = BPF_CORE_READ(ldata, read_head);
	s->canon_head = BPF_CORE_READ(ldata, canon_head);
	s->read_tail = BPF_CORE_READ(ldata, read_tail);
	s->column = BPF_CORE_READ(ldata, column);
	s->canon_column = BPF_CORE_READ(ldata, canon_column);
	if (BPF_CORE_READ_BITFIELD_PROBED(ldata, lnext))
		s->flags |= TTYF_LNEXT;
	if (BPF_CORE_READ_BITFIELD_PROBED(ldata, erasing))
		s->flags |= TTYF_ERASING;
	if (BPF_CORE_READ_BITFIELD_PROBED(ldata, push))
		s->flags |= TTYF_PUSH;
	if (BPF_CORE_READ(ldata, echo_head) != BPF_CORE_READ(ldata, echo_tail))
		s->flags |= TTYF_ECHO_PENDING;
}

static __always_inline struct tty_struct *file_tty(struct file *file)
{
	struct tty_file_private *private = file->private_data;

	return private ? BPF_CORE_READ(private, tty) : NULL;
}

static __always_inline long write_tty(struct seq_file *seq, struct file *file, bool master)
{
	struct tty_struct *tty = file_tty(file);
	struct tty_struct *link = BPF_CORE_READ(tty, link);
	struct tty_struct *slave = master ? link : tty;
	struct tty_rec *r = &out_tty;
	struct dentry *dentry;
	struct inode *inode;

	if (!tty || !link)
		return 0;
	r->hdr.kind = REC_TTY;
	r->hdr.size = sizeof(*r);
	r->is_master = master;
	/* hung_up_tty_fops has no open() */
	r->hung_up = !BPF_CORE_READ(file, f_op, open);
	r->index = BPF_CORE_READ(tty, index);
	/* devpts: the slave's driver_data is its dentry, freed when the master was closed */
	dentry = BPF_CORE_READ(slave, driver_data);
	inode = master ? BPF_CORE_READ(dentry, d_inode) : file->f_inode;
	r->uid = BPF_CORE_READ(inode, i_uid.val);
	r->gid = BPF_CORE_READ(inode, i_gid.val);
	r->mode = BPF_CORE_READ(inode, i_mode);
	fill_tty_side(&r->master, master ? tty : link);
	fill_tty_side(&r->slave, slave);
	return bpf_seq_write(seq, r, sizeof(*r));
}

static __always_inline void emit_tty_side(struct tty_struct *tty)
{
	struct n_tty_data *ldata = BPF_CORE_READ(tty, disc_data);
	u64 buf, flags;

	walk_flip(tty, true);
	if (flip_walk.failed || !ldata || BPF_CORE_READ(tty, ldisc, ops, num))
		return;
	if (BPF_CORE_READ(ldata, read_head) == BPF_CORE_READ(ldata, read_tail))
		return;
	buf = (u64)ldata + bpf_core_field_offset(struct n_tty_data, read_buf);
	flags = (u64)ldata + bpf_core_field_offset(struct n_tty_data, read_flags);
	for (u32 at = 0; at < TRK_TTY_BUF; at += TRK_TTY_CHUNK)
		if (!write_tty_data((u64)tty, TTYP_READ_BUF, buf + at, TRK_TTY_CHUNK))
			return;
	write_tty_data((u64)tty, TTYP_READ_FLAGS, flags, TRK_TTY_BUF / 8);
}

static __always_inline void emit_tty(u32 rdev, struct file *file)
{
	struct tty_struct *tty, *link;

	if (rdev != PTMX_DEV && rdev >> 20 != PTS_MAJOR)
		return;
	tty = file_tty(file);
	link = BPF_CORE_READ(tty, link);
	if (!tty || !link)
		return;
	if (first_visit((u64)tty))
		emit_tty_side(tty);
	if (first_visit((u64)link))
		emit_tty_side(link);
}
