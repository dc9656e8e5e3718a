//! Starts processes and collects the status of every child of PID 1.
//!
//! One thread reaps: restored applications and orphans are children of PID 1
//! too, so nobody may wait for a single PID behind its back.

use std::collections::HashMap;
use std::io;
use std::process::Command;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid, waitpid};

use crate::protocol::Status;

/// Knows how each finished child ended.
#[derive(Default)]
pub struct Reaper {
    /// Status of ended children that nobody has asked for yet, by PID.
    ended: Mutex<HashMap<i32, Status>>,
    changed: Condvar,
}

impl Reaper {
    /// Starts the reaping thread.
    pub fn start() -> Arc<Reaper> {
        let reaper = Arc::new(Reaper::default());
        let shared = Arc::clone(&reaper);
        std::thread::spawn(move || shared.run());
        reaper
    }

    /// Starts a command; its status is kept for [`Reaper::wait`].
    ///
    /// # Errors
    /// As `Command::spawn`.
    pub fn spawn(&self, command: &mut Command) -> io::Result<i32> {
        // Held across the fork: the thread must neither record this child
        // before an older status under the same PID is gone, nor steal the
        // child of a failed exec from the standard library.
        let mut ended = self.lock();
        let child = command.spawn()?;
        let pid = i32::try_from(child.id()).map_err(io::Error::other)?;
        ended.remove(&pid);
        drop(ended);
        self.changed.notify_all();
        Ok(pid)
    }

    /// Waits until the child has ended; none if it has not after `timeout`.
    pub fn wait(&self, pid: i32, timeout: Duration) -> Option<Status> {
        let deadline = Instant::now() + timeout;
        let mut ended = self.lock();
        loop {
            if let Some(status) = ended.remove(&pid) {
                return Some(status);
            }
            let left = deadline.checked_duration_since(Instant::now())?;
            ended = self
                .changed
                .wait_timeout(ended, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    fn run(&self) {
        loop {
            // Only looks: the status is taken below, under the lock.
            match waitid(Id::All, WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT) {
                Ok(_) => {}
                Err(Errno::ECHILD) => {
                    // No descendants at all: only a spawn can change that.
                    let ended = self.lock();
                    let wait = self.changed.wait_timeout(ended, Duration::from_secs(1));
                    drop(wait);
                    continue;
                }
                Err(_) => continue,
            }
            let mut ended = self.lock();
            while let Ok(status) = waitpid(None, Some(WaitPidFlag::WNOHANG)) {
                match status {
                    WaitStatus::Exited(pid, code) => {
                        ended.insert(pid.as_raw(), Status::Exited(code));
                    }
                    WaitStatus::Signaled(pid, signal, _) => {
                        ended.insert(pid.as_raw(), Status::Signaled(signal as i32));
                    }
                    WaitStatus::StillAlive => break,
                    _ => {}
                }
            }
            drop(ended);
            self.changed.notify_all();
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<i32, Status>> {
        self.ended.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
