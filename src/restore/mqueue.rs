//! Who is told of messages in POSIX message queues, mq_notify(3): the kernel notes the caller.

use super::RestoreError;
use super::files::FilesError;
use super::signals::{number, words_to};
use super::supervisor::Supervisor;
use super::tape::Script;
use crate::model::frozen::{Application, FileKind, MqueueNotify, OpenFile};
use crate::model::ids::{Fd, Pid};
use nix::fcntl::OFlag;
use nix::libc;

impl Supervisor<'_> {
    /// Has each process that was to be told of a message say so again. When the queues are
    /// filled, which would tell it, and it has closed what it does not keep, which would take
    /// the word back (mqueue_flush_file()).
    ///
    /// # Errors
    /// The kernel refuses a call.
    pub fn await_messages(&mut self) -> Result<(), RestoreError> {
        let app = self.app;
        for (id, notify) in registrations(app) {
            let pid = notify.pid;
            let fd = descriptor(app, pid, id).ok_or_else(|| {
                FilesError::Missing(format!("PID {pid}'s descriptor of a POSIX message queue"))
            })?;
            let tape = self.tape(pid)?;
            tape.clear_data();
            let event = words_to(tape, &event(notify))?;
            let mut script = Script::default();
            script.zero(libc::SYS_mq_notify, &[number(fd.0), event]);
            self.run(pid, pid.leader(), &script)?;
        }
        Ok(())
    }
}

fn registrations(app: &Application) -> impl Iterator<Item = (u64, &MqueueNotify)> {
    app.ofds.values().filter_map(|file| match &file.kind {
        FileKind::Mqueue {
            id,
            state: Some(state),
        } => Some((*id, state.notify.as_ref()?)),
        _ => None,
    })
}

/// A descriptor by which a process can register.
fn descriptor(app: &Application, pid: Pid, queue: u64) -> Option<Fd> {
    let is_usable = |file: &OpenFile| {
        let flags = OFlag::from_bits_retain(file.flags.cast_signed());
        matches!(file.kind, FileKind::Mqueue { id, .. } if id == queue)
            && !flags.contains(OFlag::O_PATH)
    };
    let process = app.processes.iter().find(|process| process.pid == pid)?;
    let mut entries = app.files.get(&process.files)?.fds.iter();
    let entry = entries.find(|entry| app.ofds.get(&entry.ofd).is_some_and(is_usable))?;
    Some(entry.fd)
}

/// `struct sigevent`: value, signal and method, padding.
fn event(notify: &MqueueNotify) -> [u64; 8] {
    let (signal, method) = match notify.signal {
        Some(signal) => (signal, libc::SIGEV_SIGNAL),
        None => (0, libc::SIGEV_NONE),
    };
    let both = u64::from(signal.cast_unsigned()) | u64::from(method.cast_unsigned()) << 32;
    [notify.value, both, 0, 0, 0, 0, 0, 0]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::frozen::{FdEntry, FileHints, FilesTable, MqueueState, Process};
    use crate::model::ids::{FilesId, OfdId};

    fn queue(id: u64, flags: OFlag, state: Option<MqueueState>) -> OpenFile {
        OpenFile {
            flags: flags.bits().cast_unsigned(),
            pos: 0,
            owner: None,
            locks: Vec::new(),
            lease: None,
            hints: FileHints::default(),
            kind: FileKind::Mqueue {
                id,
                state: state.map(Box::new),
            },
        }
    }

    #[test]
    fn the_process_itself_registers_by_a_descriptor_of_the_queue() {
        let notify = MqueueNotify {
            pid: Pid(6),
            signal: Some(12),
            value: 0xfeed,
        };
        let state = MqueueState {
            notify: Some(notify),
            ..MqueueState::default()
        };
        let mut app = Application::default();
        let files = [
            queue(7, OFlag::O_PATH, Some(state)),
            queue(8, OFlag::O_RDWR, None),
            queue(7, OFlag::O_WRONLY, None),
        ];
        app.ofds = (1..).map(OfdId).zip(files).collect();
        let fds = (1..4).map(|number| FdEntry {
            fd: Fd(number + 10),
            ofd: OfdId(u64::try_from(number).unwrap()),
            cloexec: false,
        });
        let fds = fds.collect();
        app.files = [(FilesId(3), FilesTable { fds })].into();
        app.processes = vec![Process {
            pid: Pid(6),
            files: FilesId(3),
            ..Process::default()
        }];
        let found: Vec<_> = registrations(&app).collect();
        assert_eq!(found, [(7, &notify)]);
        assert_eq!(descriptor(&app, Pid(6), 7), Some(Fd(13)));
        assert_eq!(descriptor(&app, Pid(6), 9), None);
        assert_eq!(descriptor(&app, Pid(5), 7), None);
    }

    #[test]
    fn an_event_lies_as_the_kernel_reads_it() {
        let notify = |signal| MqueueNotify {
            pid: Pid(6),
            signal,
            value: 0xfeed,
        };
        assert_eq!(event(&notify(Some(12)))[..3], [0xfeed, 12, 0]);
        assert_eq!(event(&notify(None))[..3], [0xfeed, 1 << 32, 0]);
        assert_eq!(size_of::<[u64; 8]>(), size_of::<libc::sigevent>());
    }
}
