//! How long a tick of the kernel is, in which it keeps times: it does not say so (`CONFIG_HZ`),
//! but it rounds what it is given.

use crate::sys::socket::{option, set_option};
use nix::libc;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
use std::os::fd::AsFd;

const MICROSECONDS: u64 = 1_000_000;

/// Ticks a second.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ticks(u64);

impl Ticks {
    /// Asks for the shortest time-out and looks what became of it: one tick.
    pub fn of_this_kernel() -> Option<Self> {
        let (family, kind) = (AddressFamily::Unix, SockType::Datagram);
        let socket = socket(family, kind, SockFlag::SOCK_CLOEXEC, None).ok()?;
        let (level, name) = (libc::SOL_SOCKET, libc::SO_RCVTIMEO);
        let shortest = [0_u64.to_ne_bytes(), 1_u64.to_ne_bytes()].concat();
        set_option(socket.as_fd(), level, name, &shortest).ok()?;
        let found = option(socket.as_fd(), level, name, 16).ok()?;
        let (seconds, rest) = timeval(&found)?;
        let tick = seconds * MICROSECONDS + rest;
        (tick > 0).then(|| Self(MICROSECONDS / tick))
    }

    /// As getsockopt(2) shows a time-out (sock_get_timeout(), net/core/sock.c).
    pub fn shown(self, ticks: u64) -> (u64, u64) {
        if ticks >= i64::MAX.cast_unsigned() {
            return (0, 0);
        }
        let rest = ticks % self.0 * MICROSECONDS / self.0;
        (ticks / self.0, rest)
    }

    /// Of so many seconds, in the 32 bits that the model has for them.
    pub fn in_seconds(self, seconds: i32) -> u32 {
        let ticks = u64::from(seconds.cast_unsigned()) * self.0;
        u32::try_from(ticks & u64::from(u32::MAX)).unwrap_or(0)
    }
}

/// The members of a `struct timeval`.
pub fn timeval(bytes: &[u8]) -> Option<(u64, u64)> {
    let (seconds, rest) = bytes.split_first_chunk::<8>()?;
    let microseconds = rest.first_chunk::<8>()?;
    Some((
        u64::from_ne_bytes(*seconds),
        u64::from_ne_bytes(*microseconds),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_kernel_has_ticks() {
        let ticks = Ticks::of_this_kernel().unwrap();
        assert!([100, 250, 300, 1000].contains(&ticks.0), "{ticks:?}");
    }

    #[test]
    fn times_are_shown_as_the_kernel_rounds_them() {
        assert_eq!(Ticks(250).shown(251), (1, 4000));
        assert_eq!(Ticks(300).shown(1), (0, 3333));
        assert_eq!(Ticks(250).shown(i64::MAX.cast_unsigned()), (0, 0));
        assert_eq!(Ticks(250).in_seconds(99), 24_750);
    }
}
