//! The cases, one file per kernel object kind.
//!
//! Each sets its objects up, says it is ready, and then uses them: contents,
//! positions, counters and behaviour must be those from before. It must pass
//! as well when nothing has happened in between.

use crate::guest::case::Entry;

mod accept;
mod aio;
mod attributes;
mod cgroup;
mod child;
mod cpu_timers;
mod events;
mod fanotify;
mod file;
mod filter;
mod hints;
mod huge;
mod job;
mod lease;
mod mapping;
mod membarrier;
mod memory;
mod message_queues;
mod mqueue;
mod mqueue_notify;
mod multicast;
mod names;
mod namespaces;
mod netlink;
mod options;
mod owner;
mod pidfd;
mod pipe;
mod pressure;
mod probe;
mod process;
mod pty;
mod raw;
mod refused;
mod refused_attributes;
mod refused_objects;
mod rewritten;
mod sched;
mod seccomp;
mod sharing;
mod signals;
mod sysv;
mod tcp;
mod tcp_ended;
mod threads;
mod time;
mod timers;
mod udp;
mod unix;
mod unix_accept;
mod unix_peers;
mod untold;
mod urgent;
mod uring;
mod write_error;

/// Every case, in the order they run in.
pub fn all() -> impl Iterator<Item = &'static Entry> {
    [
        pipe::CASES,
        accept::CASES,
        aio::CASES,
        uring::CASES,
        pressure::CASES,
        file::CASES,
        hints::CASES,
        lease::CASES,
        owner::CASES,
        options::CASES,
        multicast::CASES,
        mapping::CASES,
        names::CASES,
        namespaces::CASES,
        memory::CASES,
        huge::CASES,
        rewritten::CASES,
        membarrier::CASES,
        sysv::CASES,
        message_queues::CASES,
        mqueue::CASES,
        mqueue_notify::CASES,
        threads::CASES,
        time::CASES,
        timers::CASES,
        cpu_timers::CASES,
        signals::CASES,
        process::CASES,
        attributes::CASES,
        sched::CASES,
        seccomp::CASES,
        sharing::CASES,
        pidfd::CASES,
        cgroup::CASES,
        pty::CASES,
        job::CASES,
        events::CASES,
        fanotify::CASES,
        udp::CASES,
        netlink::CASES,
        raw::CASES,
        unix::CASES,
        unix_accept::CASES,
        unix_peers::CASES,
        tcp::CASES,
        tcp_ended::CASES,
        urgent::CASES,
        untold::CASES,
        filter::CASES,
        refused::CASES,
        refused_objects::CASES,
        refused_attributes::CASES,
        write_error::CASES,
    ]
    .into_iter()
    .flatten()
}

/// The case of this name.
pub fn find(name: &str) -> Option<&'static Entry> {
    all().find(|entry| entry.name == name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique() {
        let mut names: Vec<_> = all().map(|entry| entry.name).collect();
        let count = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), count);
    }
}
