//! A virtual machine: stock kernel, our image, a control channel.

mod builder;
mod monitor;
mod qemu;
mod template;

pub use builder::VmBuilder;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use self::qemu::{Qemu, WorkDir};
use crate::control::{Control, ControlError};
use crate::protocol::{CHUNK, Hello, Reply, Request, Status, from_hex, shell_words, to_hex};
use crate::slot::Slot;

/// Time for small requests on a loaded machine under emulation.
const PATIENCE: Duration = Duration::from_secs(60);

/// A command for the guest.
#[derive(Debug, Clone)]
pub struct Exec {
    argv: Vec<String>,
    env: Vec<(String, String)>,
    timeout: Duration,
}

impl Exec {
    /// A program with arguments.
    pub fn new<S: Into<String>>(argv: impl IntoIterator<Item = S>) -> Exec {
        Exec {
            argv: argv.into_iter().map(Into::into).collect(),
            env: Vec::new(),
            timeout: PATIENCE,
        }
    }

    /// Sets a variable.
    #[must_use]
    pub fn env(mut self, name: &str, value: &str) -> Exec {
        self.env.push((name.to_owned(), value.to_owned()));
        self
    }

    /// The command is killed after this time, 60 s unless set.
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Exec {
        self.timeout = timeout;
        self
    }
}

/// What a command in the guest left.
#[derive(Debug, Clone)]
pub struct Output {
    /// The command, for messages.
    pub command: String,
    /// How it ended.
    pub status: Status,
    /// Its standard output (the last 4 MiB).
    pub stdout: Vec<u8>,
    /// Its standard error (the last 4 MiB).
    pub stderr: Vec<u8>,
}

impl Output {
    /// True if it exited with 0.
    pub fn success(&self) -> bool {
        self.status == Status::Exited(0)
    }

    /// Its exit code; none if a signal or the timeout ended it.
    pub fn code(&self) -> Option<i32> {
        match self.status {
            Status::Exited(code) => Some(code),
            _ => None,
        }
    }

    /// Standard output as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// Standard error as text.
    pub fn error_text(&self) -> String {
        String::from_utf8_lossy(&self.stderr).into_owned()
    }

    /// This output if the command exited with 0.
    ///
    /// # Errors
    /// If not; the message holds what it wrote.
    pub fn check(self) -> Result<Output> {
        if self.success() {
            return Ok(self);
        }
        bail!(
            "{}: {}\n{}{}",
            self.command,
            self.status,
            self.text(),
            self.error_text()
        )
    }
}

/// How a command ended that may take the kernel with it.
#[derive(Debug)]
pub enum Outcome {
    /// It came back.
    Exited(Output),
    /// Another kernel has said hello meanwhile.
    Rebooted(Hello),
}

/// A running virtual machine, ended on drop. All methods take `&self`, so
/// threads may share it.
#[derive(Debug)]
pub struct Vm {
    control: Control,
    qemu: Qemu,
    log: Arc<Mutex<Vec<String>>>,
    ports: Vec<(u16, u16)>,
    dir: WorkDir,
    settings: VmBuilder,
    _slot: Slot,
}

impl Vm {
    /// Settings with their defaults; `workspace` is the repository's root.
    pub fn builder(workspace: impl Into<PathBuf>) -> VmBuilder {
        VmBuilder::new(workspace.into())
    }

    /// The settings it was started with.
    pub fn settings(&self) -> &VmBuilder {
        &self.settings
    }

    /// The host's loopback port behind a forwarded port of the guest.
    ///
    /// # Panics
    /// If the port was not given to [`VmBuilder::forward`].
    pub fn port(&self, guest: u16) -> u16 {
        let found = self.ports.iter().find(|(port, _)| *port == guest);
        found
            .unwrap_or_else(|| panic!("port {guest} is not forwarded"))
            .1
    }

    /// Runs a command to its end.
    ///
    /// # Errors
    /// If it cannot be run, or the VM ends or restarts meanwhile. A failing
    /// command is no error: see [`Output::check`].
    pub fn exec(&self, command: Exec) -> Result<Output> {
        self.try_exec(command).map_err(|error| self.explain(error))
    }

    /// Runs a script in the guest's `sh`.
    ///
    /// # Errors
    /// As [`Vm::exec`].
    pub fn sh(&self, script: &str) -> Result<Output> {
        self.exec(Exec::new(["sh", "-c", script]))
    }

    /// Runs a command that may replace the kernel, such as `tracker update`.
    ///
    /// # Errors
    /// If the VM ends or neither happens within the command's timeout.
    pub fn exec_or_reboot(&self, command: Exec) -> Result<Outcome> {
        match self.try_exec(command) {
            Ok(output) => Ok(Outcome::Exited(output)),
            Err(ControlError::Restarted(hello)) => Ok(Outcome::Rebooted(hello)),
            Err(error) => Err(self.explain(error)),
        }
    }

    fn try_exec(&self, command: Exec) -> Result<Output, ControlError> {
        let line = shell_words(&command.argv);
        let timeout_ms = u64::try_from(command.timeout.as_millis()).unwrap_or(u64::MAX);
        let request = Request::Exec {
            argv: command.argv,
            env: command.env,
            timeout_ms,
        };
        let reply = self.control.request(request, command.timeout + PATIENCE)?;
        let Reply::Exec {
            status,
            stdout,
            stderr,
        } = reply
        else {
            return Err(ControlError::Protocol(format!("{reply:?}")));
        };
        let bytes =
            |text: &str| from_hex(text).ok_or_else(|| ControlError::Protocol("bad hex".to_owned()));
        Ok(Output {
            command: line,
            status,
            stdout: bytes(&stdout)?,
            stderr: bytes(&stderr)?,
        })
    }

    /// Starts a command in a session of its own; both its output streams are
    /// appended to the file `log` in the guest. Returns the PID.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn spawn(&self, command: Exec, log: Option<&str>) -> Result<i32> {
        let request = Request::Spawn {
            argv: command.argv,
            env: command.env,
            log: log.map(str::to_owned),
        };
        match self.request(request)? {
            Reply::Spawned { pid } => Ok(pid),
            reply => bail!("The guest's answer does not fit: {reply:?}"),
        }
    }

    /// Waits for the end of a spawned process; none if it still runs then.
    ///
    /// # Errors
    /// If the guest does not answer.
    pub fn wait(&self, pid: i32, timeout: Duration) -> Result<Option<Status>> {
        let timeout_ms = u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX);
        let reply = self
            .control
            .request(Request::Wait { pid, timeout_ms }, timeout + PATIENCE);
        match reply.map_err(|error| self.explain(error))? {
            Reply::Waited { status } => Ok(status),
            reply => bail!("The guest's answer does not fit: {reply:?}"),
        }
    }

    /// Waits until a file exists in the guest; false if it does not in time.
    ///
    /// # Errors
    /// If the guest does not answer.
    pub fn await_file(&self, path: &str, timeout: Duration) -> Result<bool> {
        self.await_state(path, true, timeout)
    }

    /// Waits until a file, or `/proc/PID`, is gone from the guest.
    ///
    /// # Errors
    /// If the guest does not answer.
    pub fn await_gone(&self, path: &str, timeout: Duration) -> Result<bool> {
        self.await_state(path, false, timeout)
    }

    fn await_state(&self, path: &str, exists: bool, timeout: Duration) -> Result<bool> {
        let timeout_ms = u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX);
        let request = Request::AwaitFile {
            path: path.to_owned(),
            exists,
            timeout_ms,
        };
        let reply = self.control.request(request, timeout + PATIENCE);
        match reply.map_err(|error| self.explain(error))? {
            Reply::Awaited(met) => Ok(met),
            reply => bail!("The guest's answer does not fit: {reply:?}"),
        }
    }

    /// Sends a signal to a process, or to a group if `pid` is negative.
    ///
    /// # Errors
    /// If there is no such process.
    pub fn kill(&self, pid: i32, signal: i32) -> Result<()> {
        self.request(Request::Kill { pid, signal }).map(|_| ())
    }

    /// Reads a file of the guest.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn read_file(&self, path: &str) -> Result<Vec<u8>> {
        let mut content = Vec::new();
        loop {
            let offset = u64::try_from(content.len())?;
            let reply = self.request(Request::Read {
                path: path.to_owned(),
                offset,
            })?;
            let Reply::Data { data, eof } = reply else {
                bail!("The guest's answer does not fit: {reply:?}");
            };
            content.extend(from_hex(&data).context("Bad hex from the guest")?);
            if eof {
                return Ok(content);
            }
        }
    }

    /// Writes a file of the guest in place (also in /proc and /sys).
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn write_file(&self, path: &str, content: &[u8]) -> Result<()> {
        let mut offset = 0;
        loop {
            let part = &content[offset..content.len().min(offset + CHUNK)];
            let data = to_hex(part);
            self.request(Request::Write {
                path: path.to_owned(),
                offset: u64::try_from(offset)?,
                data,
            })?;
            offset += part.len();
            if offset >= content.len() {
                return Ok(());
            }
        }
    }

    /// Copies a file of the host into the guest, replacing it by a rename.
    ///
    /// # Errors
    /// If it cannot be read or written.
    pub fn push(&self, from: &Path, to: &str, mode: u32) -> Result<()> {
        let content = fs::read(from).with_context(|| format!("Read {}", from.display()))?;
        let part = format!("{to}.part");
        self.write_file(&part, &content)?;
        self.request(Request::Install {
            from: part,
            to: to.to_owned(),
            mode,
        })?;
        Ok(())
    }

    /// The guest's last hello.
    ///
    /// # Panics
    /// Never: a VM is handed out after its first hello.
    pub fn hello(&self) -> Hello {
        self.control.hello().expect("start() waits for it")
    }

    /// How many times the guest's agent has started: 1 after the first boot.
    pub fn boots(&self) -> usize {
        self.control.boots()
    }

    /// Waits until the agent has started more than `boots` times.
    ///
    /// # Errors
    /// If the VM ends or time is up.
    pub fn wait_for_hello(&self, boots: usize, timeout: Duration) -> Result<Hello> {
        self.control
            .wait_for_hello(boots, timeout)
            .map_err(|error| self.explain(error))
    }

    /// Waits until QEMU has ended (interactive use).
    ///
    /// # Errors
    /// If its process cannot be waited for.
    pub fn wait_for_end(&self) -> Result<()> {
        while self.qemu.ended().is_none() {
            std::thread::sleep(Duration::from_millis(100));
        }
        Ok(())
    }

    /// True while QEMU runs.
    pub fn alive(&self) -> bool {
        self.qemu.ended().is_none()
    }

    /// The last lines on the guest's console.
    pub fn console_tail(&self, lines: usize) -> String {
        let log = self.log.lock().unwrap_or_else(PoisonError::into_inner);
        log[log.len().saturating_sub(lines)..].join("\n")
    }

    /// All lines on the guest's console so far.
    pub fn console(&self) -> Vec<String> {
        self.log
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Keeps the working directory after all.
    pub fn keep_files(&mut self) {
        self.dir.keep = true;
    }

    fn request(&self, request: Request) -> Result<Reply> {
        self.control
            .request(request, PATIENCE)
            .map_err(|error| self.explain(error))
    }

    /// What the emulator had to say, and how it ended.
    fn qemu_said(&self) -> String {
        let said = fs::read_to_string(self.dir.path.join("qemu.log")).unwrap_or_default();
        match self.qemu.ended() {
            Some(status) => format!("{status}\n{said}"),
            None => said,
        }
    }

    /// Adds the console's end to errors that only it explains.
    fn explain(&self, error: ControlError) -> anyhow::Error {
        match error {
            ControlError::Dead(_) | ControlError::Timeout(_) => {
                let (console, said) = (self.console_tail(40), self.qemu_said());
                anyhow::Error::new(error).context(format!("{said}\nConsole:\n{console}"))
            }
            error => error.into(),
        }
    }
}
