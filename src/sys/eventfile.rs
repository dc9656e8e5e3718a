//! Descriptors that deliver events: timerfd, signalfd, inotify, epoll.

use super::fd::owned;
use crate::model::frozen::{BusyPoll, Timerfd};
use nix::errno::Errno;
use nix::libc;
use std::ffi::CStr;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

/// `TFD_IOC_SET_TICKS` of include/uapi/linux/timerfd.h.
const TFD_IOC_SET_TICKS: u64 = 0x4008_5400;

fn timespec(ns: u64) -> libc::timespec {
    libc::timespec {
        tv_sec: (ns / 1_000_000_000).cast_signed(),
        tv_nsec: (ns % 1_000_000_000).cast_signed(),
    }
}

/// timerfd_create(2), not armed.
///
/// # Errors
/// As the system call.
pub fn timerfd(timer: &Timerfd) -> Result<OwnedFd, Errno> {
    // SAFETY: takes two integers and returns a new descriptor.
    owned(unsafe { libc::timerfd_create(timer.clock, libc::TFD_CLOEXEC | libc::TFD_NONBLOCK) })
}

/// Arms a timerfd with the time that was left, or for the same moment when it waits for a
/// moment of the wall clock, which showed `realtime` when time was left.
///
/// # Errors
/// As timerfd_settime(2).
pub fn arm_timerfd(fd: &OwnedFd, timer: &Timerfd, realtime: u64) -> Result<(), Errno> {
    let wall = [libc::CLOCK_REALTIME, libc::CLOCK_REALTIME_ALARM].contains(&timer.clock);
    let absolute =
        wall && timer.remaining > 0 && timer.settime_flags & libc::TFD_TIMER_ABSTIME != 0;
    let (flags, first) = if absolute {
        (timer.settime_flags, realtime + timer.remaining)
    } else {
        (0, timer.remaining)
    };
    let value = libc::itimerspec {
        it_interval: timespec(timer.interval),
        it_value: timespec(first),
    };
    // SAFETY: reads one itimerspec; no old value is asked for.
    let result = unsafe {
        libc::timerfd_settime(
            fd.as_raw_fd(),
            flags,
            &raw const value,
            std::ptr::null_mut(),
        )
    };
    Errno::result(result).map(drop)
}

/// Sets the expirations not read yet (`TFD_IOC_SET_TICKS`).
///
/// # Errors
/// `ENOTTY`: a kernel without `CONFIG_CHECKPOINT_RESTORE`.
pub fn set_timerfd_ticks(fd: &OwnedFd, ticks: u64) -> Result<(), Errno> {
    // SAFETY: the request reads one u64.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), TFD_IOC_SET_TICKS, &raw const ticks) };
    Errno::result(result).map(drop)
}

/// signalfd4(2) for the signals of a kernel mask (bit 0 is signal 1).
///
/// # Errors
/// As the system call.
pub fn signalfd(mask: u64) -> Result<OwnedFd, Errno> {
    let flags = libc::SFD_CLOEXEC | libc::SFD_NONBLOCK;
    // SAFETY: the kernel reads the eight bytes of `mask`.
    let result = unsafe { libc::syscall(libc::SYS_signalfd4, -1, &raw const mask, 8_usize, flags) };
    owned(i32::try_from(result).unwrap_or(-1))
}

/// epoll_ctl(2) `EPOLL_CTL_ADD`.
///
/// # Errors
/// As the system call.
pub fn epoll_add(epoll: BorrowedFd<'_>, fd: i32, events: u32, data: u64) -> Result<(), Errno> {
    let mut event = libc::epoll_event { events, u64: data };
    // SAFETY: reads one epoll_event.
    let result =
        unsafe { libc::epoll_ctl(epoll.as_raw_fd(), libc::EPOLL_CTL_ADD, fd, &raw mut event) };
    Errno::result(result).map(drop)
}

/// `EPIOCSPARAMS`.
///
/// # Errors
/// `ENOTTY`, `EINVAL`: Linux before 6.9.
pub fn set_busy_poll(epoll: BorrowedFd<'_>, params: &BusyPoll) -> Result<(), Errno> {
    let params = libc::epoll_params {
        busy_poll_usecs: params.usecs,
        busy_poll_budget: params.budget,
        prefer_busy_poll: params.prefer.into(),
        __pad: 0,
    };
    // SAFETY: reads one epoll_params.
    let set = unsafe { libc::ioctl(epoll.as_raw_fd(), libc::EPIOCSPARAMS, &raw const params) };
    Errno::result(set).map(drop)
}

/// inotify_init1(2).
///
/// # Errors
/// As the system call.
pub fn inotify() -> Result<OwnedFd, Errno> {
    // SAFETY: takes an integer and returns a new descriptor.
    owned(unsafe { libc::inotify_init1(libc::IN_CLOEXEC | libc::IN_NONBLOCK) })
}

/// inotify_add_watch(2); gives the watch descriptor.
///
/// # Errors
/// As the system call.
pub fn add_watch(fd: &OwnedFd, path: &CStr, mask: u32) -> Result<i32, Errno> {
    // SAFETY: `path` ends with a NUL.
    Errno::result(unsafe { libc::inotify_add_watch(fd.as_raw_fd(), path.as_ptr(), mask) })
}

/// inotify_rm_watch(2).
///
/// # Errors
/// As the system call.
pub fn remove_watch(fd: &OwnedFd, watch: i32) -> Result<(), Errno> {
    // SAFETY: takes two integers.
    Errno::result(unsafe { libc::inotify_rm_watch(fd.as_raw_fd(), watch) }).map(drop)
}
