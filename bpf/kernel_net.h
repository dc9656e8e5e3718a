/* SPDX-License-Identifier: (GPL-2.0-only OR MIT) */
/* Part of kernel.h, which explains it: sockets. */
#ifndef TRACKER_KERNEL_NET_H
#define TRACKER_KERNEL_NET_H

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)

struct in6_addr {
	u8 s6_addr_bytes[16];
};
typedef struct {
	struct net *net;
} possible_net_t;
struct sock_common {
	u32 skc_daddr;
	u32 skc_rcv_saddr;
	u16 skc_dport;
	u16 skc_num;
	u16 skc_family;
	volatile u8 skc_state;
	unsigned char skc_reuse : 4;
	unsigned char skc_reuseport : 1;
	unsigned char skc_ipv6only : 1;
	int skc_bound_dev_if;
	possible_net_t skc_net;
	unsigned long skc_flags;
	struct in6_addr skc_v6_daddr;
	struct in6_addr skc_v6_rcv_saddr;
	atomic64_t skc_cookie;
};
struct sk_buff {
	struct sk_buff *next;
	struct rb_node rbnode;
	struct sock *sk;
	unsigned int len;
	unsigned int data_len;
	char cb[48];
	unsigned int end; /* from the head */
	unsigned char *head;
	unsigned char *data;
};
struct tcp_skb_cb {
	u32 seq;
};
struct unix_skb_parms {
	struct pid *pid;
	kuid_t uid;
	kgid_t gid;
	void *fp;
};
struct page {
	unsigned long flags;
};
/* struct bio_vec until 6.8 */
struct skb_frag {
	unsigned int len;
};
struct skb_shared_info {
	u8 nr_frags;
	struct sk_buff *frag_list;
	struct skb_frag frags[1];
};
struct sk_buff_head {
	struct sk_buff *next;
	u32 qlen;
};
struct sock_cgroup_data {
	struct cgroup *cgroup;
};
struct sock_fprog_kern;
struct bpf_prog {
	struct sock_fprog_kern *orig_prog;
};
struct sk_filter {
	struct bpf_prog *prog;
};
struct sock_reuseport {
	struct bpf_prog *prog;
};
struct sock {
	struct sock_common __sk_common;
	struct sk_buff_head sk_receive_queue;
	struct sk_buff_head sk_error_queue;
	struct sk_buff_head sk_write_queue;
	struct rb_root tcp_rtx_queue;
	struct {
		atomic_t rmem_alloc;
	} sk_backlog;
	int sk_rcvbuf;
	int sk_sndbuf;
	struct sk_filter *sk_filter;
	struct sock_reuseport *sk_reuseport_cb;
	int sk_wmem_queued;
	u32 sk_priority;
	u32 sk_mark;
	u16 sk_type;
	u16 sk_protocol;
	int sk_err;
	u32 sk_ack_backlog;
	u32 sk_max_ack_backlog;
	u8 sk_shutdown;
	atomic_t sk_zckey;
	u8 sk_userlocks : 4;
	long sk_rcvtimeo;
	long sk_sndtimeo;
	int sk_rcvlowat;
	u32 sk_lingertime;
	struct socket *sk_socket;
	struct pid *sk_peer_pid;
	const struct cred *sk_peer_cred;
	struct sock_cgroup_data sk_cgrp_data;
	void *sk_policy[2];
	int sk_peek_off;
	unsigned int sk_ll_usec;
	u8 sk_prefer_busy_poll;
	unsigned long sk_max_pacing_rate;
	u32 sk_tsflags;
	int sk_bind_phc;
	u8 sk_txrehash;
	u8 sk_clockid;
	u8 sk_txtime_deadline_mode : 1;
	u8 sk_txtime_report_errors : 1;
};
typedef enum {
	SS_CONNECTED = 3,
} socket_state;
struct socket {
	socket_state state;
	short type;
	unsigned long flags;
	struct file *file;
	struct sock *sk;
};
struct in_addr {
	u32 s_addr;
};
struct ip_mreqn {
	struct in_addr imr_multiaddr;
	int imr_ifindex;
};
struct ip_mc_socklist {
	struct ip_mc_socklist *next_rcu;
	struct ip_mreqn multi;
	unsigned int sfmode;
	void *sflist;
};
struct ipv6_mc_socklist {
	struct in6_addr addr;
	int ifindex;
	unsigned int sfmode;
	struct ipv6_mc_socklist *next;
	void *sflist;
};
struct ipv6_pinfo {
	struct ipv6_mc_socklist *ipv6_mc_list;
	s16 hop_limit : 9; /* a member of its own since 6.9, as is pmtudisc */
	u16 pmtudisc : 3;
	u16 srcprefs : 3;
	u8 min_hopcount;
	u8 tclass;
	union {
		struct {
			u16 rxinfo : 1;
		} bits;
	} rxopt;
	int ucast_oif;
	int mcast_oif;
	u32 frag_size;
	void *ipv6_fl_list; /* in struct inet_sock since 6.17 */
	void *opt;
};
/* until they went to inet_flags */
struct ipv6_pinfo___bits {
	u16 recverr : 1;
	u16 sndflow : 1;
	u16 dontfrag : 1;
	u16 autoflowlabel : 1;
	u16 autoflowlabel_set : 1;
};
/* until 6.5 */
struct inet_sock___bits {
	u16 cmsg_flags;
	u8 recverr : 1;
	u8 freebind : 1;
	u8 transparent : 1;
	u8 bind_address_no_port : 1;
};
/* as stable kernels before 6.3 have it */
struct inet_sock___range {
	struct {
		u16 lo;
		u16 hi;
	} local_port_range;
};
struct ip_options {
	unsigned char optlen;
};
struct ip_options_rcu {
	struct ip_options opt;
};
struct inet_sock {
	unsigned long inet_flags; /* since 6.6 */
	struct ipv6_pinfo *pinet6;
	void *ipv6_fl_list;
	struct ip_options_rcu *inet_opt;
	u32 local_port_range;
	u8 tos;
	u8 min_ttl;
	u8 pmtudisc;
	s16 uc_ttl;
	int uc_index;
	int mc_index;
	struct ip_mc_socklist *mc_list;
};
struct request_sock {
	struct request_sock *dl_next;
	struct sock *sk;
};
struct fastopen_queue {
	int max_qlen;
};
struct request_sock_queue {
	atomic_t qlen;
	struct fastopen_queue fastopenq;
	u8 rskq_defer_accept;
	struct request_sock *rskq_accept_head;
};
struct tcp_congestion_ops {
	char name[16];
};
struct inet_connection_sock {
	struct request_sock_queue icsk_accept_queue;
	struct tcp_congestion_ops *icsk_ca_ops;
	u32 icsk_user_timeout;
	void *icsk_ulp_ops;
	u8 icsk_syn_retries;
};
struct tcp_options_received {
	u32 ts_recent;
	u16 tstamp_ok : 1;
	u16 wscale_ok : 1;
	u16 sack_ok : 3;
	u16 snd_wscale : 4;
	u16 rcv_wscale : 4;
	u16 user_mss;
	u16 mss_clamp;
};
struct tcp_sock {
	struct tcp_options_received rx_opt;
	u32 copied_seq;
	u32 rcv_nxt;
	u32 snd_una;
	u32 write_seq;
	u32 snd_nxt;
	u32 snd_wnd;
	u32 snd_wl1;
	u32 max_window;
	u32 rcv_wnd;
	u32 rcv_wup;
	u64 bytes_acked;
	u32 tsoffset;
	u16 urg_data;
	u32 snd_up;
	u8 tcp_usec_ts : 1; /* since 6.7 */
	u8 nonagle : 4;
	u8 keepalive_probes;
	u32 keepalive_time;
	u32 keepalive_intvl;
	u32 notsent_lowat;
	u32 mss_cache;
	u32 window_clamp;
	int linger2;
	u32 tcp_tx_delay;
	u8 thin_lto : 1;
	u8 recvmsg_inq : 1;
	u8 save_syn : 2;
	u8 fastopen_connect : 1;
	u8 fastopen_no_cookie : 1;
	void *md5sig_info;
	void *ao_info; /* since 6.7 */
};
struct udp_sock {
	int pending;
	struct sk_buff_head reader_queue;
};
struct scm_stat {
	atomic_t nr_fds;
};
struct sockaddr_un {
	u16 sun_family;
	char sun_path[TRK_SUN_PATH_LEN];
};
struct unix_address {
	int len;
	struct sockaddr_un name[];
};
struct unix_sock {
	struct sock sk;
	struct unix_address *addr;
	struct sock *peer;
	struct scm_stat scm_stat;
	void *oob_skb;
};

#pragma clang attribute pop

#endif
