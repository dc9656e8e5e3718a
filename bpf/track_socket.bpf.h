/* SPDX-License-Identifier: (GPL-2.0-only OR MIT) */
/* Sockets: their whole state is said when a descriptor is made and after each call
 * that changes it; TCP also changes state by itself. */

#include "socket.bpf.h"

#define SOCK_SEQPACKET 5
#define SHUTDOWN_MASK 3

static __always_inline void fill_event_inet(const bool typed, struct sock_part *e, struct sock *sk)
{
	u16 dport = MEMBER(typed, sk, __sk_common.skc_dport);
	u32 local, remote;

	e->local_port = MEMBER(typed, sk, __sk_common.skc_num);
	e->remote_port = dport >> 8 | dport << 8;
	if (e->family == AF_INET) {
		local = MEMBER(typed, sk, __sk_common.skc_rcv_saddr);
		remote = MEMBER(typed, sk, __sk_common.skc_daddr);
		__builtin_memcpy(e->local_addr, &local, sizeof(local));
		__builtin_memcpy(e->remote_addr, &remote, sizeof(remote));
	} else if (bpf_core_field_exists(sk->__sk_common.skc_v6_daddr)) {
		bpf_core_read(&e->local_addr, 16, &sk->__sk_common.skc_v6_rcv_saddr);
		bpf_core_read(&e->remote_addr, 16, &sk->__sk_common.skc_v6_daddr);
	}
}

static __always_inline void fill_event_unix(struct sock_part *e, struct sock *sk)
{
	struct unix_sock *unix = (void *)sk;
	struct unix_address *addr = BPF_CORE_READ(unix, addr);
	int len;

	e->peer = (u64)BPF_CORE_READ(unix, peer);
	if (!addr)
		return;
	len = BPF_CORE_READ(addr, len) - (int)sizeof(u16);
	if (len > 0 && len <= TRK_SUN_PATH_LEN) {
		e->path_len = len;
		bpf_probe_read_kernel(e->path, sizeof(e->path),
				      (char *)addr +
					      bpf_core_field_offset(struct unix_address, name) +
					      sizeof(u16));
	}
}

/*
 * Sockets of tracked processes that were made outside: they came with a process that was moved,
 * or were handed over; a connection is of the cgroup its listener was made in, and one of a Unix
 * listener of the cgroup it is connected from. By address; the value is the number of the event
 * that said so last. User space adds those it finds by reading, and takes out what is gone.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 65536);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, u64);
	__type(value, u64);
} adopted SEC(".maps");

/* Never less than there are: nobody looks while there are none. */
u64 adoptions;

/* Whether a socket was made in a tracked cgroup. `typed` is about the socket, see MEMBER. */
static __always_inline bool made_inside(const bool typed, struct sock *sk)
{
	return !bpf_core_field_exists(sk->sk_cgrp_data) ||
	       cgroup_tracked(MEMBER(typed, sk, sk_cgrp_data.cgroup));
}

static __always_inline bool any_adopted(void)
{
	return *(volatile u64 *)&adoptions;
}

static __always_inline bool is_adopted(struct sock *sk)
{
	u64 key = address(sk);

	return any_adopted() && bpf_map_lookup_elem(&adopted, &key);
}

/* From here on, whoever changes the socket, it is said; so its state is read afterwards. If
 * there is no room, or user space takes it out right now, it is read again. */
static __always_inline void adopt(struct sock *sk, u64 seq)
{
	u64 key = address(sk);

	__sync_fetch_and_add(&adoptions, 1);
	if (!bpf_map_update_elem(&adopted, &key, &seq, BPF_NOEXIST))
		return;
	__sync_fetch_and_add(&adoptions, -1);
	if (bpf_map_update_elem(&adopted, &key, &seq, BPF_EXIST))
		note_loss(key, CLASS_SOCKET);
}

/* Whether what happens to a socket is said: who changes it may be anyone. */
static __always_inline bool sock_tracked(const bool typed, struct sock *sk)
{
	return root_count && (current_tracked() || made_inside(typed, sk) || is_adopted(sk));
}

/* `typed` is about the socket, see MEMBER. */
static __always_inline void fill_socket(const bool typed, struct sock_part *e, struct sock *sk,
					u64 ino)
{
	__builtin_memset(e, 0, sizeof(*e));
	e->sock = (u64)sk;
	e->ino = ino;
	e->family = MEMBER(typed, sk, __sk_common.skc_family);
	e->type = MEMBER(typed, sk, sk_type);
	e->protocol = MEMBER(typed, sk, sk_protocol);
	e->state = MEMBER(typed, sk, __sk_common.skc_state);
	e->shutdown = MEMBER(typed, sk, sk_shutdown);
	fill_opts(typed, &e->opts, sk, e->family, e->protocol);
	if (e->family == AF_UNIX)
		fill_event_unix(e, sk);
	else if (e->family == AF_INET || e->family == AF_INET6)
		fill_event_inet(typed, e, sk);
}

static __always_inline void send_socket(struct sock *sk, u64 ino)
{
	struct socket_event *e;

	if (!sk)
		return;
	e = EVENT(struct socket_event, EVENT_SOCKET, sk, CLASS_SOCKET);
	if (!e)
		return;
	fill_socket(false, &e->socket, sk, ino);
	submit(e);
}

/* Of a file whose type the verifier knows; so it then knows the socket's. */
static __always_inline struct sock *typed_sock_of(struct file *file)
{
	struct socket *socket = bpf_sock_from_file(file);

	return socket ? socket->sk : NULL;
}

static __always_inline struct sock *sock_of_file(struct file *file)
{
	struct socket *socket = BPF_CORE_READ(file, private_data);

	return BPF_CORE_READ(socket, sk);
}

static __always_inline bool is_socket(struct file *file)
{
	return file && (BPF_CORE_READ(file, f_inode, i_mode) & S_IFMT) == S_IFSOCK;
}

/* After a call that may have changed a socket. Those of others are looked at only while there
 * are adopted sockets: who made such a one may still hold it, as service managers do. */
static __always_inline void socket_file_changed(struct file *file)
{
	bool tracked = current_tracked();
	struct sock *sk;

	if ((!tracked && !any_adopted()) || !is_socket(file))
		return;
	sk = sock_of_file(file);
	if (tracked || is_adopted(sk))
		send_socket(sk, BPF_CORE_READ(file, f_inode, i_ino));
}

static __always_inline void socket_changed(u32 fd)
{
	if (current_tracked() || any_adopted())
		socket_file_changed(file_at(current_files(), fd));
}

SEC("fexit/__sys_bind")
int BPF_PROG(sys_bind, int fd)
{
	socket_changed(fd);
	return 0;
}

SEC("fexit/__sys_listen")
int BPF_PROG(sys_listen, int fd)
{
	socket_changed(fd);
	return 0;
}

/* A socket that sends without having been bound gets a port or name on the way. */
static __always_inline int bound(struct sock *sk)
{
	struct file *file;

	if (!current_tracked() && !is_adopted(sk))
		return 0;
	file = BPF_CORE_READ(sk, sk_socket, file);
	if (file)
		send_socket(sk, BPF_CORE_READ(file, f_inode, i_ino));
	return 0;
}

SEC("fexit/inet_autobind")
int BPF_PROG(inet_bound, struct sock *sk)
{
	return bound(sk);
}

SEC("fexit/unix_autobind")
int BPF_PROG(unix_bound, struct sock *sk)
{
	return bound(sk);
}

SEC("fexit/__sys_connect_file")
int BPF_PROG(sys_connect, struct file *file)
{
	socket_file_changed(file);
	return 0;
}

static __noinline void send_state(struct sock *sk, u32 state, u32 shutdown)
{
	struct sock_state_event *e;

	e = EVENT(struct sock_state_event, EVENT_SOCKET_STATE, sk, CLASS_SOCKET);
	if (!e)
		return;
	e->sock = (u64)sk;
	e->state = state;
	e->shutdown = shutdown;
	submit(e);
}

static __always_inline struct sock *unix_peer(struct sock *sk)
{
	struct unix_sock *unix = (void *)sk;

	if (!sk || BPF_CORE_READ(sk, __sk_common.skc_family) != AF_UNIX)
		return NULL;
	return BPF_CORE_READ(unix, peer);
}

/* What one end of a Unix connection shuts, the other end has shut too; that may be the tracked
 * one. */
SEC("fexit/__sys_shutdown")
int BPF_PROG(sys_shutdown, int fd)
{
	struct file *file = file_at(current_files(), fd);
	struct sock *sk, *peer;

	if (!is_socket(file))
		return 0;
	sk = sock_of_file(file);
	if (sk && sock_tracked(false, sk))
		send_socket(sk, BPF_CORE_READ(file, f_inode, i_ino));
	peer = unix_peer(sk);
	if (peer && sock_tracked(false, peer))
		send_state(peer, BPF_CORE_READ(peer, __sk_common.skc_state),
			   BPF_CORE_READ(peer, sk_shutdown));
	return 0;
}

/* Before it shuts both directions of the other end. */
SEC("fentry/unix_release_sock")
int BPF_PROG(unix_release, struct sock *sk)
{
	u16 type = sk->sk_type;
	struct sock *peer;

	if (type != SOCK_STREAM && type != SOCK_SEQPACKET)
		return 0;
	peer = unix_peer(sk);
	if (peer && sock_tracked(false, peer))
		send_state(peer, BPF_CORE_READ(peer, __sk_common.skc_state), SHUTDOWN_MASK);
	return 0;
}

SEC("fexit/__sys_setsockopt")
int BPF_PROG(sys_setsockopt, int fd)
{
	socket_changed(fd);
	return 0;
}

/* A connection that ends by itself is shut in both directions right after. */
static __always_inline void state_changed(struct sock *sk, int state)
{
	if (sock_tracked(true, sk))
		send_state(sk, state, state == TCP_CLOSE ? SHUTDOWN_MASK : sk->sk_shutdown);
}

/*
 * The kernel leaves a program out where it runs on that CPU already: here whenever the network
 * interrupts a task that changes a state, and then changes others. A second program has the
 * other's turns then. Nothing interrupts the network's changes with more of them, so one is enough.
 * The first program begins to count as running some instructions before its own first one, so
 * it cannot say that it is interrupted: it says instead of each change of the network that it saw
 * it, and the second one, right after, does what nobody saw.
 */
#define CHANGING_CPUS 1024

struct changing {
	u64 ctx[2]; /* of the two programs: the verifier takes what comes from here for numbers */
	u64 seen;
	u64 unused[5]; /* a cache line for each CPU */
} changing[CHANGING_CPUS];

/* Turns that the stand-in took: user space does not count them as missed. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, u64);
} stood_in SEC(".maps");

static __always_inline volatile struct changing *changing_here(void)
{
	return &changing[bpf_get_smp_processor_id() & (CHANGING_CPUS - 1)];
}

#define STACK_LEN (16 << 10) /* THREAD_SIZE */

/* Whether this is not what the current task itself does: soft interrupts have a stack of their
 * own, or are in ksoftirqd, which no other one interrupts. The arguments are on the stack. */
static __always_inline bool by_network(u64 ctx)
{
	return ctx - (u64)bpf_get_current_task_btf()->stack >= STACK_LEN;
}

SEC("tp_btf/inet_sock_set_state")
int BPF_PROG(inet_sock_set_state, struct sock *sk, int old, int state)
{
	volatile struct changing *here = changing_here();

	here->ctx[0] = (u64)ctx;
	here->seen = by_network(here->ctx[0]);
	state_changed(sk, state);
	return 0;
}

SEC("tp_btf/inet_sock_set_state")
int BPF_PROG(inet_sock_set_state_stand_in, struct sock *sk, int old, int state)
{
	volatile struct changing *here = changing_here();
	u32 key = 0;
	u64 *count;

	here->ctx[1] = (u64)ctx;
	/* While this runs for a task, it does not for the network that interrupts the task: what
	 * was said of those changes ends here. */
	if (here->seen || !by_network(here->ctx[1])) {
		here->seen = 0;
		return 0;
	}
	count = bpf_map_lookup_elem(&stood_in, &key);
	if (count)
		++*count;
	state_changed(sk, state);
	return 0;
}
