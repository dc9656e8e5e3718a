/* SPDX-License-Identifier: (GPL-2.0-only OR MIT) */
/* Part of kernel.h, which explains it: files and what is behind them. */
#ifndef TRACKER_KERNEL_FILE_H
#define TRACKER_KERNEL_FILE_H

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)

struct qstr {
	u32 len;
	const unsigned char *name;
};
struct backing_dev_info {
	unsigned long ra_pages;
};
struct super_block {
	u32 s_dev;
	unsigned long s_magic;
	struct backing_dev_info *s_bdi;
};
struct file_lock_context {
	struct list_head flc_flock;
	struct list_head flc_posix;
	struct list_head flc_lease;
};
typedef u32 errseq_t;
struct address_space {
	errseq_t wb_err;
};
struct inode {
	u16 i_mode;
	kuid_t i_uid;
	kgid_t i_gid;
	struct super_block *i_sb;
	unsigned long i_ino;
	unsigned int i_nlink;
	u32 i_rdev;
	s64 i_size;
	struct file_lock_context *i_flctx;
	struct pipe_inode_info *i_pipe;
	struct fsnotify_mark_connector *i_fsnotify_marks;
	void *i_private;
};
/* the hint is an enum since 6.9 */
struct inode___byte_hint {
	u8 i_write_hint;
};
enum rw_hint {
	RW_HINT_NONE,
} __attribute__((packed));
struct inode___enum_hint {
	enum rw_hint i_write_hint;
};
struct dentry {
	struct dentry *d_parent;
	struct qstr d_name;
	struct inode *d_inode;
};
struct vfsmount {
	struct dentry *mnt_root;
};
struct mount {
	struct vfsmount mnt;
	int mnt_id;
};
struct fown_struct {
	struct pid *pid;
	enum pid_type pid_type;
	kuid_t uid;
	kuid_t euid;
	int signum;
};
struct file_ra_state {
	unsigned int ra_pages;
};
/* f_owner is a pointer since 6.12; f_count became f_ref in 6.13 */
struct file_operations {
	void *open;
};
struct file {
	struct path f_path;
	struct inode *f_inode;
	struct file_operations *f_op;
	atomic_long_t f_count;
	unsigned int f_flags;
	u32 f_mode;
	s64 f_pos;
	struct fown_struct *f_owner;
	errseq_t f_wb_err;
	struct address_space *f_mapping;
	struct file_ra_state f_ra;
	void *private_data;
};
struct file___embedded {
	struct fown_struct f_owner;
};
typedef struct {
	atomic64_t refcnt;
} file_ref_t;
struct file___ref {
	file_ref_t f_ref;
};
struct fdtable {
	unsigned int max_fds;
	struct file **fd;
	unsigned long *close_on_exec;
	unsigned long *open_fds;
};
struct files_struct {
	atomic_t count;
	struct fdtable *fdt;
	struct fdtable fdtab;
	unsigned long close_on_exec_init[1];
	unsigned long open_fds_init[1];
};
struct eventfd_ctx {
	u64 count;
	unsigned int flags;
};
struct signalfd_ctx {
	sigset_t sigmask;
};
struct timerfd_ctx {
	union {
		struct hrtimer tmr;
		struct alarm alarm;
	} t;
	s64 tintv;
	u64 ticks;
	int clockid;
	u16 expired;
	u16 settime_flags;
};
struct pipe_buffer {
	unsigned int len;
};
struct pipe_inode_info {
	unsigned int head;
	unsigned int tail;
	unsigned int ring_size;
	unsigned int readers;
	unsigned int writers;
	struct pipe_buffer *bufs;
};
struct epoll_event {
	u32 events;
	u64 data;
} __attribute__((packed));
struct epoll_filefd {
	struct file *file;
	int fd;
} __attribute__((packed));
struct epitem {
	struct rb_node rbn;
	struct list_head rdllink;
	struct epoll_filefd ffd;
	struct eventpoll *ep;
	struct epoll_event event;
};
struct eventpoll {
	struct rb_root_cached rbr;
	struct file *file;
	/* since 6.9 */
	u32 busy_poll_usecs;
	u16 busy_poll_budget;
	bool prefer_busy_poll;
};
struct poll_table_struct {
	unsigned long _key;
};
struct ep_pqueue {
	struct poll_table_struct pt;
	struct epitem *epi;
};
struct fanotify_group_private_data {
	struct list_head access_list;
	unsigned int flags;
};
struct fsnotify_group {
	struct list_head marks_list;
	unsigned int q_len;
	struct fanotify_group_private_data fanotify_data;
};
struct fsnotify_mark_connector {
	void *obj;
	struct hlist_head list;
};
struct fsnotify_mark {
	u32 mask;
	struct fsnotify_group *group;
	struct list_head g_list;
	struct hlist_node obj_list;
	struct fsnotify_mark_connector *connector;
};
struct dnotify_struct {
	struct dnotify_struct *dn_next;
	struct file *dn_filp;
};
struct dnotify_mark {
	struct fsnotify_mark fsn_mark;
	struct dnotify_struct *dn;
};
struct inotify_inode_mark {
	struct fsnotify_mark fsn_mark;
	int wd;
};
struct fasync_struct {
	int fa_fd;
};
/* before 6.9 the common part of a lock was not a struct of its own */
struct file_lock {
	struct list_head fl_list;
	void *fl_owner;
	unsigned int fl_flags;
	unsigned char fl_type;
	unsigned int fl_pid;
	struct file *fl_file;
	s64 fl_start;
	s64 fl_end;
	struct fasync_struct *fl_fasync;
};
struct file_lock_core {
	struct list_head flc_list;
	void *flc_owner;
	unsigned int flc_flags;
	unsigned char flc_type;
	s32 flc_pid;
	struct file *flc_file;
};
struct file_lease {
	struct file_lock_core c;
	struct fasync_struct *fl_fasync;
};

/* a file of a pseudo filesystem that is made up as it is read */
struct seq_file {
	void *private;
};
struct kernfs_open_file {
	void *priv;
};
struct psi_window {
	u64 size;
};
enum psi_states {
	PSI_IO_SOME,
};
struct psi_trigger {
	enum psi_states state;
	u64 threshold;
	struct psi_window win;
};
struct cgroup_file_ctx {
	struct {
		void *trigger;
	} psi;
};

/* io_uring_types.h; some members are in unnamed structs there, which CO-RE looks through */
struct xarray {
	void *xa_head;
};
struct io_hash_bucket {
	struct hlist_head list;
};
struct io_hash_table {
	struct io_hash_bucket *hbs;
	unsigned int hash_bits;
};
struct io_ring_ctx {
	unsigned int flags;
	unsigned int restricted : 1;
	unsigned int iowq_limits_set : 1;
	unsigned int cached_sq_head;
	unsigned int sq_entries;
	unsigned int cached_cq_tail;
	unsigned int cq_entries;
	unsigned int nr_user_files;
	unsigned int nr_user_bufs;
	void *io_ev_fd;
	void *io_bl;
	struct xarray io_bl_xa;
	struct xarray personalities;
	struct list_head cq_overflow_list;
	struct list_head timeout_list;
	struct io_hash_table cancel_table;
	struct io_hash_table cancel_table_locked;
	struct hlist_head futex_list;
	struct hlist_head waitid_list;
	struct hlist_head cancelable_uring_cmd;
	unsigned char napi_enabled;
};
/* since 6.13 */
struct io_rsrc_data {
	unsigned int nr;
};
struct io_file_table {
	struct io_rsrc_data data;
};
struct io_ring_ctx___tables {
	struct io_file_table file_table;
	struct io_rsrc_data buf_table;
	unsigned char napi_track_mode;
};

struct shared_policy {
	struct rb_root root;
};
struct shmem_inode_info {
	struct shared_policy policy;
	struct inode vfs_inode;
};

#pragma clang attribute pop

#endif
