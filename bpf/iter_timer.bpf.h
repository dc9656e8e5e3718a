/* SPDX-License-Identifier: (GPL-2.0-only OR MIT) */
/*
 * Timers. They go on while tasks are frozen, and fire between two readings of this pass: then a
 * record tells of the timer before it fired or after, never half of each. What firing leaves
 * behind (a queued signal, ticks) is read first for a timer that is armed, and again for one that
 * is not.
 */

#define SIGEV_NONE 1
#define SIGEV_THREAD_ID 4
#define MAX_TIMERS (1 << 16)
#define CLOCK_REALTIME 0
#define CLOCK_BOOTTIME 7
#define CLOCK_REALTIME_ALARM 8
#define CLOCK_BOOTTIME_ALARM 9
#define TIMER_ENQUEUED 1 /* HRTIMER_STATE_ENQUEUED, ALARMTIMER_STATE_ENQUEUED */

struct timer_rec out_timer;

/* Whether its callback runs: noted before the timer is dequeued (__run_hrtimer()), so to be
 * asked after. */
static __always_inline bool hrtimer_runs(struct hrtimer *timer)
{
	return BPF_CORE_READ(timer, base, running) == timer;
}

/* When it fires; 0 if it does not. One whose callback runs has not fired yet. */
static __always_inline u64 hrtimer_expires(struct hrtimer *timer)
{
	u64 expires = BPF_CORE_READ(timer, node.expires);
	bool armed = BPF_CORE_READ(timer, state) & TIMER_ENQUEUED;

	return armed || hrtimer_runs(timer) ? expires : 0;
}

static __always_inline u64 alarm_expires(struct alarm *alarm)
{
	u64 expires = BPF_CORE_READ(alarm, node.expires);
	bool armed = BPF_CORE_READ(alarm, state) & TIMER_ENQUEUED;

	return armed || hrtimer_runs(&alarm->timer) ? expires : 0;
}

static __always_inline bool timer_queued(struct k_itimer *timer)
{
	struct k_itimer___embedded *embedded = (void *)timer;
	struct sigqueue *sigq;

	if (bpf_core_field_exists(embedded->sigq.info))
		return BPF_CORE_READ(embedded, sigq.list.next) != &embedded->sigq.list;
	sigq = BPF_CORE_READ(timer, sigq);
	return sigq && BPF_CORE_READ(sigq, list.next) != &sigq->list;
}

#define CPUCLOCK_SCHED 2
#define CPUCLOCK_PERTHREAD 4

/* Of the CPU clock of a thread, its own or another one's of the process: whose it is, and what it
 * shows. That counts on while the thread runs, which none does that is frozen. */
static __always_inline void read_thread_clock(struct timer_rec *r, struct k_itimer *timer)
{
	struct task_struct *task;
	struct hlist_node *node;
	struct pid *pid;

	r->clock_tid = 0;
	r->used_ns = 0;
	if (r->clock >= 0 || !(r->clock & CPUCLOCK_PERTHREAD))
		return;
	pid = BPF_CORE_READ(timer, it.cpu.pid);
	node = BPF_CORE_READ(pid, tasks[0].first);
	if (!node)
		return;
	task = (void *)node - bpf_core_field_offset(struct task_struct, pid_links);
	r->clock_tid = pid_nr(pid);
	if ((r->clock & 3) == CPUCLOCK_SCHED)
		r->used_ns = BPF_CORE_READ(task, se.sum_exec_runtime);
	else
		r->used_ns = BPF_CORE_READ(task, utime);
	if (!(r->clock & 3))
		r->used_ns += BPF_CORE_READ(task, stime);
}

static __always_inline bool emit_timer(struct k_itimer *timer, u32 pid)
{
	struct k_itimer___embedded *embedded = (void *)timer;
	struct timer_rec *r = &out_timer;
	s32 clock = BPF_CORE_READ(timer, it_clock);

	r->hdr.kind = REC_TIMER;
	r->hdr.size = sizeof(*r);
	r->pid = pid;
	r->id = BPF_CORE_READ(timer, it_id);
	r->clock = clock;
	r->notify = BPF_CORE_READ(timer, it_sigev_notify);
	if (bpf_core_field_exists(embedded->sigq.info)) {
		r->signo = BPF_CORE_READ(embedded, sigq.info.si_signo);
		r->value = (u64)BPF_CORE_READ(embedded, sigq.info._sifields._rt._sigval.sival_ptr);
	} else {
		r->signo = BPF_CORE_READ(timer, sigq, info.si_signo);
		r->value = (u64)BPF_CORE_READ(timer, sigq, info._sifields._rt._sigval.sival_ptr);
	}
	r->target = 0;
	if (r->notify & SIGEV_THREAD_ID)
		r->target = pid_nr(BPF_CORE_READ(timer, it_pid));
	r->queued = timer_queued(timer);
	r->interval_ns = BPF_CORE_READ(timer, it_interval);
	r->overrun = BPF_CORE_READ(timer, it_overrun);
	r->overrun_last = BPF_CORE_READ(timer, it_overrun_last);
	read_thread_clock(r, timer);
	if (clock < 0 || clock == 2 || clock == 3) {
		/* CPU clocks: armed while queued */
		r->base_clock = clock;
		r->expires_ns = BPF_CORE_READ(timer, it.cpu.head)
					? BPF_CORE_READ(timer, it.cpu.node.expires)
					: 0;
	} else if (clock == CLOCK_REALTIME_ALARM || clock == CLOCK_BOOTTIME_ALARM) {
		struct alarm *alarm = &timer->it.alarm.alarmtimer;

		r->base_clock = clock == CLOCK_REALTIME_ALARM ? CLOCK_REALTIME : CLOCK_BOOTTIME;
		r->expires_ns = alarm_expires(alarm);
	} else {
		r->base_clock = BPF_CORE_READ(timer, it.real.timer.base, clockid);
		r->expires_ns = hrtimer_expires(&timer->it.real.timer);
		/* a timer that notifies nobody is never queued, only compared with the clock */
		if (r->notify == SIGEV_NONE)
			r->expires_ns = BPF_CORE_READ(timer, it.real.timer.node.expires);
	}
	/* one that is not armed may have fired since */
	if (!r->expires_ns)
		r->queued = timer_queued(timer);
	return side_write(r, sizeof(*r));
}

/* The walk's position lives in memory and not on the stack: Linux 6.1 mistakes a stack
 * variable of a bpf_loop callback that starts as a constant for one that stays so. */
struct {
	u64 node;
	u64 end;
	u32 pid;
	u32 pad;
} timer_walk;

static long timer_step(u64 index, void *ctx)
{
	struct list_head *node = (void *)timer_walk.node;
	struct k_itimer *timer;

	if (!node || timer_walk.node == timer_walk.end)
		return 1;
	timer = (void *)node - bpf_core_field_offset(struct k_itimer, list);
	if (!emit_timer(timer, timer_walk.pid))
		return 1;
	timer_walk.node = (u64)BPF_CORE_READ(node, next);
	return 0;
}

static __always_inline void emit_timers(struct task_struct *task, struct signal_struct *signal)
{
	if (!bpf_core_field_exists(signal->posix_timers))
		return;
	timer_walk.pid = task->tgid;
	/* list_head and hlist_head both begin with the first node; only a list_head is
	 * its own end */
	timer_walk.end = (u64)signal + bpf_core_field_offset(struct signal_struct, posix_timers);
	bpf_core_read(&timer_walk.node, 8, &signal->posix_timers);
	bpf_loop(MAX_TIMERS, timer_step, NULL, 0);
}
