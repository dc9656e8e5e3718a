//! Descriptions without a name or a peer: eventfd, timerfd, signalfd, inotify.

use super::error::{FilesError, call};
use super::regular::watched;
use crate::model::frozen::{InotifyWatch, Timerfd};
use crate::sys::eventfile;
use nix::sys::eventfd::{EfdFlags, EventFd};
use std::os::fd::OwnedFd;

/// Makes an eventfd with its count.
///
/// # Errors
/// The kernel refuses.
pub fn eventfd(count: u64, semaphore: bool, nonblock: bool) -> Result<OwnedFd, FilesError> {
    let object = "eventfd";
    let mut flags = EfdFlags::EFD_CLOEXEC;
    flags.set(EfdFlags::EFD_SEMAPHORE, semaphore);
    flags.set(EfdFlags::EFD_NONBLOCK, nonblock);
    let first = u32::try_from(count).unwrap_or(0);
    let fd = EventFd::from_value_and_flags(first, flags).map_err(call(object, "eventfd2"))?;
    let rest = count - u64::from(first);
    if rest > 0 {
        // It does not block: the count has room.
        fd.write(rest).map_err(call(object, "write"))?;
    }
    Ok(fd.into())
}

/// Makes a timerfd with its time left and its unread expirations; `realtime` is what the wall
/// clock showed when it had that time left.
///
/// # Errors
/// The kernel refuses, or lacks `CONFIG_CHECKPOINT_RESTORE`.
pub fn timerfd(timer: &Timerfd, realtime: u64) -> Result<OwnedFd, FilesError> {
    let object = "timerfd";
    let fd = eventfile::timerfd(timer).map_err(call(object, "timerfd_create"))?;
    eventfile::arm_timerfd(&fd, timer, realtime).map_err(call(object, "timerfd_settime"))?;
    if timer.ticks > 0 {
        eventfile::set_timerfd_ticks(&fd, timer.ticks)
            .map_err(call(object, "ioctl(TFD_IOC_SET_TICKS)"))?;
    }
    Ok(fd)
}

/// Makes a signalfd.
///
/// # Errors
/// The kernel refuses.
pub fn signalfd(mask: u64) -> Result<OwnedFd, FilesError> {
    eventfile::signalfd(mask).map_err(call("signalfd", "signalfd4"))
}

/// Makes an inotify instance that watches nothing yet, see [`watch`].
///
/// # Errors
/// The kernel refuses.
pub fn inotify() -> Result<OwnedFd, FilesError> {
    eventfile::inotify().map_err(call("inotify", "inotify_init1"))
}

/// Gives an inotify instance its watches, with their old descriptors.
///
/// # Errors
/// A watched file is gone or another one, or the kernel hands out other watch descriptors.
pub fn watch(fd: &OwnedFd, watches: &[InotifyWatch]) -> Result<(), FilesError> {
    let mut removed = false;
    for watch in watches {
        let object = format!(
            "inotify watch of {}",
            String::from_utf8_lossy(&watch.at.path)
        );
        let path = watched(&watch.at, &object)?;
        // Descriptors count upwards from 1 and are not reused
        // (inotify_add_to_idr): those of removed watches are used up in between.
        loop {
            let number = eventfile::add_watch(fd, &path, watch.mask)
                .map_err(call(&object, "inotify_add_watch"))?;
            if number == watch.wd {
                break;
            }
            if number > watch.wd {
                return Err(FilesError::Unsupported(format!(
                    "{object} as number {}",
                    watch.wd
                )));
            }
            eventfile::remove_watch(fd, number).map_err(call(&object, "inotify_rm_watch"))?;
            removed = true;
        }
    }
    // Each removal queued an IN_IGNORED.
    let mut events = [0_u8; 4096];
    while removed && nix::unistd::read(fd, &mut events).is_ok_and(|got| got > 0) {}
    Ok(())
}
