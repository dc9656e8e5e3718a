//! System calls whose failure is fine, and what all kinds of operations need.

use crate::random::LAST;
use std::ffi::CString;
use std::os::raw::c_int;

/// A system call of integers, and of pointers to values that live across it.
macro_rules! call {
    ($call:expr) => {
        // SAFETY: integers, and pointers to values that live across the call.
        unsafe { $call }
    };
}
pub(crate) use call;

pub fn flag(on: bool, value: c_int) -> c_int {
    if on { value } else { 0 }
}

pub fn close(fd: c_int) {
    call!(libc::close(fd));
}

/// A number above the range would never be closed again.
pub fn keep_small<const N: usize>(fds: [c_int; N]) {
    fds.into_iter().filter(|fd| *fd > LAST).for_each(close);
}

pub fn fork() -> c_int {
    call!(libc::fork())
}

pub fn exit() -> ! {
    call!(libc::_exit(0))
}

pub fn set_name(random: u64) {
    let name = CString::new(format!("storm{:x}", random & 0xffff)).expect("no NUL");
    call!(libc::prctl(libc::PR_SET_NAME, name.as_ptr()));
}

/// Children of the storm's children are never waited for, and nobody minds what signals
/// readiness.
pub fn ignore_signals() {
    for signal in [libc::SIGCHLD, libc::SIGIO, libc::SIGUSR1, libc::SIGHUP] {
        call!(libc::signal(signal, libc::SIG_IGN));
    }
}

extern "C" fn nothing(_: c_int) {}

/// Has SIGUSR2 end the call that a thread waits in.
pub fn be_interruptible() {
    // SAFETY: zeroes are a valid sigaction: no flags, so calls are not restarted.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = nothing as *const () as usize;
    call!(libc::sigaction(
        libc::SIGUSR2,
        &raw const action,
        std::ptr::null_mut()
    ));
}

pub fn sleep_ms(ms: i64) {
    let time = libc::timespec {
        tv_sec: 0,
        tv_nsec: ms * 1_000_000,
    };
    call!(libc::nanosleep(&raw const time, std::ptr::null_mut()));
}

pub fn pause_forever() -> ! {
    loop {
        call!(libc::pause());
    }
}
