//! Compares the model with the kernel's truth, taken from /proc.

use super::proc::{self, ProcFd, ProcItem, ProcSocket};
use super::{Gone, Settle, Tracking};
use crate::model::event::FileKind;
use crate::model::ids::{Fd, OfdId, Pid, TaskId};
use crate::model::state::{Ofd, Socket, State, Task};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

/// One object that the model and the kernel describe differently.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Difference {
    /// Process.
    pub pid: Pid,
    /// Object, as `fd 7` or `thread 12`.
    pub object: String,
    /// What the model says; empty if it does not have it.
    pub model: String,
    /// What the kernel says; empty if it does not have it.
    pub kernel: String,
}

/// How much was compared.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct Compared {
    pub processes: usize,
    pub threads: usize,
    pub descriptors: usize,
    pub sockets: usize,
    pub epoll_items: usize,
}

/// What an audit found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// Objects that differed in the same way every time.
    pub differences: Vec<Difference>,
    /// Objects that differed every time, but changed meanwhile: a running program.
    pub unstable: Vec<Difference>,
    /// How much was compared.
    pub compared: Compared,
    /// How often it was compared.
    pub rounds: u32,
}

const ROUNDS: u32 = 4;
const PAUSE: Duration = Duration::from_millis(100);

/// Compares until nothing differs, at most a few times: a program that runs changes
/// between the look at the model and the look at /proc.
///
/// # Errors
///
/// The model's thread is gone.
pub fn audit(tracking: &Tracking) -> Result<Report, Gone> {
    let mut report = Report::default();
    let mut before = BTreeMap::new();
    for round in 1..=ROUNDS {
        let state = tracking.state(Settle::Suspects)?;
        let cgroups = tracking.roots.iter().flat_map(|root| {
            let path = |below: PathBuf| root.path.join(below);
            root.subtree().into_values().map(path).collect::<Vec<_>>()
        });
        let (found, compared) = compare(&state, &cgroups.collect::<Vec<_>>());
        report = Report {
            compared,
            rounds: round,
            ..Report::default()
        };
        for difference in found {
            let key = (difference.pid, difference.object.clone());
            let same = before.get(&key) == Some(&difference);
            if round == 1 || same {
                report.differences.push(difference);
            } else if before.contains_key(&key) {
                report.unstable.push(difference);
            } else {
                // New in this round; the next one judges it.
                report.differences.push(difference);
            }
        }
        if report.differences.is_empty() && report.unstable.is_empty() {
            break;
        }
        let all = report.differences.iter().chain(&report.unstable).cloned();
        let next: BTreeMap<_, _> = all.map(|d| ((d.pid, d.object.clone()), d)).collect();
        if round == ROUNDS {
            // What is new in the last round was not there before: the program's doing.
            let (old, new) = report
                .differences
                .into_iter()
                .partition(|d| before.values().any(|b| b == d));
            report.differences = old;
            report.unstable.extend::<Vec<_>>(new);
        }
        before = next;
        thread::sleep(PAUSE);
    }
    Ok(report)
}

/// One comparison of a state with what /proc says about the processes in these cgroups.
#[must_use]
pub fn compare(state: &State, cgroups: &[PathBuf]) -> (Vec<Difference>, Compared) {
    let mut audit = Audit {
        state,
        found: Vec::new(),
        compared: Compared::default(),
    };
    let kernel = proc::processes(cgroups.iter().map(PathBuf::as_path));
    let processes = state.processes();
    let alive = |tasks: &Vec<(TaskId, &Task)>| tasks.iter().any(|(_, task)| !task.zombie);
    let model: BTreeSet<Pid> = processes
        .iter()
        .filter(|(_, tasks)| alive(tasks))
        .map(|(pid, _)| *pid)
        .collect();
    for pid in kernel.union(&model) {
        audit.compared.processes += 1;
        let (in_model, in_kernel) = (model.contains(pid), kernel.contains(pid));
        if in_model && in_kernel {
            audit.process(*pid, &processes[pid]);
        } else {
            let say = |there: bool| if there { "exists" } else { "" };
            audit.differ(*pid, "process", say(in_model), say(in_kernel));
        }
    }
    (audit.found, audit.compared)
}

struct Audit<'a> {
    state: &'a State,
    found: Vec<Difference>,
    compared: Compared,
}

impl Audit<'_> {
    fn differ(
        &mut self,
        pid: Pid,
        object: impl Into<String>,
        model: impl Into<String>,
        kernel: impl Into<String>,
    ) {
        let (object, model, kernel) = (object.into(), model.into(), kernel.into());
        if model != kernel {
            self.found.push(Difference {
                pid,
                object,
                model,
                kernel,
            });
        }
    }

    fn process(&mut self, pid: Pid, tasks: &[(TaskId, &Task)]) {
        let kernel = match proc::threads(pid) {
            Ok(threads) => threads,
            Err(error) => return self.differ(pid, "threads", "exist", error.to_string()),
        };
        let model: BTreeMap<_, _> = tasks.iter().map(|(_, task)| (task.tid, task)).collect();
        let tids: BTreeSet<_> = kernel.keys().chain(model.keys()).copied().collect();
        for tid in tids {
            self.compared.threads += 1;
            let name = model.get(&tid).map_or("", |task| task.comm.as_str());
            let comm = kernel.get(&tid).map_or("", String::as_str);
            self.differ(pid, format!("thread {tid}"), name, comm);
        }
        let mut seen = BTreeSet::new();
        let sockets = proc::sockets(pid);
        for (_, task) in tasks {
            let Some(files) = task.files.filter(|files| seen.insert(*files)) else {
                continue;
            };
            let Some(table) = self.state.tables.get(&files) else {
                continue;
            };
            let kernel = match proc::descriptors(pid, task.tid) {
                Ok(fds) => fds,
                Err(error) => {
                    self.differ(
                        pid,
                        format!("table of {}", task.tid),
                        "exists",
                        error.to_string(),
                    );
                    continue;
                }
            };
            let fds: BTreeSet<Fd> = table.fds.keys().chain(kernel.keys()).copied().collect();
            for fd in fds {
                self.compared.descriptors += 1;
                let slot = table.fds.get(&fd);
                let ofd = slot.and_then(|slot| Some((slot, self.state.ofds.get(&slot.ofd)?)));
                let model =
                    ofd.map(|(slot, ofd)| describe(slot.cloexec, model_kind(ofd), ofd.inode.ino));
                let truth = kernel.get(&fd);
                let said = truth.map(|truth| describe(truth.cloexec, &truth.kind, truth.ino));
                let (model, said) = (model.unwrap_or_default(), said.unwrap_or_default());
                self.differ(pid, format!("fd {fd}"), model, said);
                if let (Some((slot, ofd)), Some(truth)) = (ofd, truth) {
                    self.open_file(pid, fd, slot.ofd, ofd, truth, &sockets);
                }
            }
        }
    }

    fn open_file(
        &mut self,
        pid: Pid,
        fd: Fd,
        id: OfdId,
        ofd: &Ofd,
        truth: &ProcFd,
        sockets: &BTreeMap<u64, ProcSocket>,
    ) {
        if ofd.kind == FileKind::Epoll {
            self.epoll(pid, fd, id, truth);
        }
        let socket = ofd.sock.and_then(|sock| self.state.sockets.get(&sock));
        if let (Some(socket), Some(truth)) = (socket, sockets.get(&ofd.inode.ino)) {
            self.compared.sockets += 1;
            let (model, kernel) = describe_socket(socket, truth);
            self.differ(pid, format!("socket of fd {fd}"), model, kernel);
        }
    }

    fn epoll(&mut self, pid: Pid, fd: Fd, id: OfdId, truth: &ProcFd) {
        const ONESHOT: u32 = 1 << 30;
        // The kernel disarms a one-shot item when it fires, which no hook sees.
        let armed = |item: ProcItem| ProcItem {
            events: if item.events & ONESHOT != 0 {
                ONESHOT
            } else {
                item.events
            },
            ..item
        };
        let items = self
            .state
            .epolls
            .get(&id)
            .into_iter()
            .flat_map(|epoll| &epoll.items);
        let mut model: Vec<ProcItem> = items
            .map(|((target, fd), item)| {
                let ino = self.state.ofds.get(target).map_or(0, |ofd| ofd.inode.ino);
                armed(ProcItem {
                    fd: *fd,
                    events: item.events,
                    data: item.data,
                    ino,
                })
            })
            .collect();
        let mut kernel: Vec<ProcItem> = truth.items.iter().copied().map(armed).collect();
        // A description that no descriptor refers to any more is known by address only.
        let unknown: BTreeSet<_> = model
            .iter()
            .filter(|item| item.ino == 0)
            .map(|item| (item.fd, item.data))
            .collect();
        for item in &mut kernel {
            if unknown.contains(&(item.fd, item.data)) {
                item.ino = 0;
            }
        }
        for item in &mut model {
            if unknown.contains(&(item.fd, item.data)) {
                item.ino = 0;
            }
        }
        self.compared.epoll_items += kernel.len();
        model.sort_unstable();
        kernel.sort_unstable();
        let only = |a: &[ProcItem], b: &[ProcItem]| {
            let text = |item: &ProcItem| {
                format!(
                    "tfd {} events {:x} data {:x} ino {}",
                    item.fd, item.events, item.data, item.ino
                )
            };
            a.iter()
                .filter(|item| !b.contains(item))
                .map(text)
                .collect::<Vec<_>>()
                .join(", ")
        };
        let (more, less) = (only(&model, &kernel), only(&kernel, &model));
        self.differ(pid, format!("items of epoll fd {fd}"), more, less);
    }
}

fn describe(cloexec: bool, kind: &str, ino: u64) -> String {
    format!("{kind} {ino}{}", if cloexec { " cloexec" } else { "" })
}

fn model_kind(ofd: &Ofd) -> &'static str {
    match ofd.kind {
        FileKind::Unknown => "unknown",
        FileKind::Socket => "socket",
        FileKind::Pipe => "pipe",
        FileKind::Eventfd => "eventfd",
        FileKind::Epoll => "eventpoll",
        FileKind::Timerfd => "timerfd",
        FileKind::Signalfd => "signalfd",
        FileKind::Inotify => "inotify",
        FileKind::Fanotify => "fanotify",
        FileKind::Pidfd => "pidfd",
        FileKind::Memfd => "memfd",
        FileKind::IoUring => "io_uring",
        FileKind::Userfaultfd => "userfaultfd",
        FileKind::PerfEvent => "perf_event",
        FileKind::Namespace => "namespace",
        _ => "file",
    }
}

/// A model's socket and /proc's in the same words.
fn describe_socket(socket: &Socket, truth: &ProcSocket) -> (String, String) {
    let info = &socket.info;
    let end = |address: &[u8], port: u16| format!("{address:02x?}:{port}");
    match truth {
        ProcSocket::Inet {
            local,
            remote,
            state,
        } => {
            let width = local.0.len().min(16);
            let model = format!(
                "{} -> {} state {}",
                end(&info.local_addr[..width], info.local_port),
                end(&info.remote_addr[..width], info.remote_port),
                info.state
            );
            let (local, remote) = (end(&local.0, local.1), end(&remote.0, remote.1));
            (model, format!("{local} -> {remote} state {state}"))
        }
        ProcSocket::Unix { listening, name } => {
            const TCP_LISTEN: u8 = 10;
            // /proc shows NUL as @ and stops at the end of a path.
            let mut bound: Vec<u8> = info
                .name
                .iter()
                .map(|byte| if *byte == 0 { b'@' } else { *byte })
                .collect();
            if info.name.first().is_some_and(|byte| *byte != 0) {
                bound = info
                    .name
                    .split(|byte| *byte == 0)
                    .next()
                    .unwrap_or_default()
                    .to_vec();
            }
            let text = |listening: bool, name: &[u8]| {
                let name = String::from_utf8_lossy(name);
                format!("{}{name}", if listening { "listening " } else { "" })
            };
            (
                text(info.state == TCP_LISTEN, &bound),
                text(*listening, name),
            )
        }
    }
}
