//! A virtual machine: stock kernel, our image, a control channel.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::control::{Control, ControlError, Shared};
use crate::guest::init::SHELL_WORD;
use crate::image::{Image, Kernel};
use crate::protocol::{
    CHUNK, Hello, PORT_NAME, Reply, Request, Status, from_hex, shell_words, to_hex,
};
use crate::{payload, slot::Slot};

/// Time for small requests on a loaded machine under emulation.
const PATIENCE: Duration = Duration::from_secs(60);

/// Settings of a VM that has not been started.
#[derive(Debug, Clone)]
pub struct VmBuilder {
    kernel: Kernel,
    memory_mib: u32,
    reserved: Option<String>,
    cpus: u32,
    icount: bool,
    interactive: bool,
    append: Vec<String>,
    forward: Vec<u16>,
    workspace: PathBuf,
    keep: bool,
    quiet: bool,
}

impl VmBuilder {
    /// The kernel that the VM boots first; 6.1 unless set.
    #[must_use]
    pub fn kernel(mut self, kernel: Kernel) -> Self {
        self.kernel = kernel;
        self
    }

    /// Memory in MiB, 3072 unless set.
    #[must_use]
    pub fn memory_mib(mut self, memory: u32) -> Self {
        self.memory_mib = memory;
        self
    }

    /// The `memmap=` reservation behind `/dev/pmem0`, `960M!2G` unless set.
    #[must_use]
    pub fn reserved(mut self, range: Option<&str>) -> Self {
        self.reserved = range.map(str::to_owned);
        self
    }

    /// Number of virtual CPUs, 2 unless set.
    #[must_use]
    pub fn cpus(mut self, cpus: u32) -> Self {
        self.cpus = cpus;
        self
    }

    /// Counts instructions instead of time: repeatable, one CPU only.
    #[must_use]
    pub fn icount(mut self, icount: bool) -> Self {
        self.icount = icount;
        self
    }

    /// A shell on the serial console, which is this process's terminal.
    #[must_use]
    pub fn interactive(mut self, interactive: bool) -> Self {
        self.interactive = interactive;
        self
    }

    /// One more word for the kernel command line.
    #[must_use]
    pub fn append(mut self, word: &str) -> Self {
        self.append.push(word.to_owned());
        self
    }

    /// Makes a TCP port of the guest reachable: see [`Vm::port`].
    #[must_use]
    pub fn forward(mut self, port: u16) -> Self {
        self.forward.push(port);
        self
    }

    /// Keeps the working directory (console log and all) when the VM ends.
    #[must_use]
    pub fn keep(mut self, keep: bool) -> Self {
        self.keep = keep;
        self
    }

    /// Says nothing about the boot on stderr.
    #[must_use]
    pub fn quiet(mut self, quiet: bool) -> Self {
        self.quiet = quiet;
        self
    }

    /// Builds our programs, boots, and waits for the guest's hello.
    ///
    /// # Errors
    /// If the image is missing, the build fails or the guest does not come up.
    pub fn start(self) -> Result<Vm> {
        payload::build(&self.workspace)?;
        let slot = Slot::take()?;
        let dir = WorkDir::create(&self.workspace, self.keep)?;
        payload::pack(
            &programs(&self.workspace),
            &dir.path.join("stage"),
            &dir.path.join("programs.tar"),
        )?;
        let begun = Instant::now();
        let ports = self
            .forward
            .iter()
            .map(|&guest| Ok((guest, free_port()?)))
            .collect::<Result<Vec<_>>>()?;
        let socket = dir.path.join("control");
        let mut qemu = Command::new("qemu-system-x86_64");
        self.arguments(&mut qemu, &dir.path, &ports)?;
        if self.interactive {
            qemu.args(["-serial", "mon:stdio"]);
        } else {
            qemu.args(["-serial", "stdio"])
                .stdin(Stdio::null())
                .stdout(Stdio::piped());
            qemu.stderr(File::create(dir.path.join("qemu.log")).context("Create qemu.log")?);
        }
        let mut child = qemu
            .spawn()
            .context("Run qemu-system-x86_64 (see `cargo xtask setup`)")?;
        let shared = Arc::new(Shared::default());
        let log = Arc::new(Mutex::new(Vec::new()));
        if let Some(console) = child.stdout.take() {
            let file = File::create(dir.path.join("console.log")).context("Create console.log")?;
            let (shared, log) = (Arc::clone(&shared), Arc::clone(&log));
            std::thread::spawn(move || watch_console(console, file, &log, &shared));
        }
        let qemu = Qemu {
            child: Mutex::new(child),
        };
        let control = loop {
            match Control::connect(&socket, Arc::clone(&shared)) {
                Ok(control) => break control,
                Err(error) if begun.elapsed() > PATIENCE || qemu.ended().is_some() => {
                    let said = fs::read_to_string(dir.path.join("qemu.log")).unwrap_or_default();
                    bail!("Connect to QEMU: {error}\n{said}");
                }
                Err(_) => std::thread::sleep(Duration::from_millis(20)),
            }
        };
        let quiet = self.quiet;
        let vm = Vm {
            control,
            qemu,
            log,
            ports,
            dir,
            settings: self,
            _slot: slot,
        };
        let hello = vm
            .control
            .wait_for_hello(0, Duration::from_secs(120))
            .map_err(|error| vm.explain(error))?;
        if !quiet {
            eprintln!(
                "vm: {} up after {:.1} s (guest: init {:.1} s, hello {:.1} s)",
                hello.release,
                begun.elapsed().as_secs_f32(),
                Duration::from_millis(hello.init_ms).as_secs_f32(),
                Duration::from_millis(hello.uptime_ms).as_secs_f32(),
            );
        }
        Ok(vm)
    }

    fn arguments(&self, qemu: &mut Command, dir: &Path, ports: &[(u16, u16)]) -> Result<()> {
        let image = Image::locate()?;
        if self.icount {
            qemu.args([
                "-accel",
                "tcg,thread=single",
                "-icount",
                "shift=0,sleep=off",
                "-smp",
                "1",
            ]);
        } else {
            qemu.args(["-accel", "tcg,thread=multi", "-smp", &self.cpus.to_string()]);
        }
        qemu.args(["-cpu", "max", "-m", &format!("{}M", self.memory_mib)]);
        // A reset ends QEMU: a panicking kernel (panic=-1) must not boot again.
        qemu.args([
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-no-reboot",
        ]);
        qemu.arg("-kernel").arg(image.vmlinuz(self.kernel)?);
        qemu.arg("-initrd").arg(image.initrd(self.kernel)?);
        qemu.args(["-append", &self.command_line()]);
        // The root disk's changes go to a nameless temporary file.
        qemu.args([
            "-drive",
            &format!(
                "file={},format=raw,if=none,id=root,snapshot=on,cache=unsafe",
                path(&image.root())?
            ),
        ]);
        qemu.args(["-device", "virtio-blk-pci,drive=root"]);
        qemu.args([
            "-drive",
            &format!(
                "file={},format=raw,if=none,id=programs,readonly=on",
                path(&dir.join("programs.tar"))?
            ),
        ]);
        qemu.args(["-device", "virtio-blk-pci,drive=programs"]);
        let mut network = "user,id=net0".to_owned();
        for (guest, host) in ports {
            network += &format!(",hostfwd=tcp:127.0.0.1:{host}-:{guest}");
        }
        qemu.args([
            "-netdev",
            &network,
            "-device",
            "virtio-net-pci,netdev=net0,romfile=",
        ]);
        qemu.args(["-device", "virtio-serial-pci"]);
        qemu.args([
            "-chardev",
            &format!(
                "socket,id=control,path={},server=on,wait=off",
                path(&dir.join("control"))?
            ),
        ]);
        qemu.args([
            "-device",
            &format!("virtserialport,chardev=control,name={PORT_NAME}"),
        ]);
        qemu.args(["-device", "virtio-rng-pci"]);
        Ok(())
    }

    /// The command line of the first kernel.
    fn command_line(&self) -> String {
        let mut words: Vec<String> = [
            "root=/dev/vda",
            "rw",
            "console=ttyS0",
            "panic=-1",
            "net.ifnames=0",
        ]
        .map(str::to_owned)
        .into();
        words.extend(self.reserved.iter().map(|range| format!("memmap={range}")));
        if self.interactive {
            words.push(SHELL_WORD.to_owned());
        }
        words.extend(self.append.iter().cloned());
        words.join(" ")
    }
}

/// Directory of the programs that cargo builds: the one this program is in.
fn programs(workspace: &Path) -> PathBuf {
    std::env::current_exe()
        .ok()
        .and_then(|exe| exe.parent().map(Path::to_path_buf))
        .filter(|dir| dir.join("guestd").exists())
        .unwrap_or_else(|| workspace.join("target/debug"))
}

fn path(path: &Path) -> Result<&str> {
    path.to_str()
        .filter(|text| !text.contains(','))
        .with_context(|| format!("QEMU cannot take the path {}", path.display()))
}

/// A free port of the loopback device, free at least right now.
fn free_port() -> Result<u16> {
    Ok(TcpListener::bind(("127.0.0.1", 0))
        .context("Find a free port")?
        .local_addr()?
        .port())
}

/// Directory of one VM's files, removed with it.
#[derive(Debug)]
struct WorkDir {
    path: PathBuf,
    keep: bool,
}

impl WorkDir {
    fn create(workspace: &Path, keep: bool) -> Result<WorkDir> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = workspace.join(format!("target/vm/{}.{number}", std::process::id()));
        if path.exists() {
            fs::remove_dir_all(&path).with_context(|| format!("Remove {}", path.display()))?;
        }
        fs::create_dir_all(&path).with_context(|| format!("Create {}", path.display()))?;
        Ok(WorkDir { path, keep })
    }
}

impl Drop for WorkDir {
    fn drop(&mut self) {
        if self.keep {
            eprintln!("vm: kept {}", self.path.display());
        } else {
            // A leftover in target/ harms nobody.
            let _ = fs::remove_dir_all(&self.path);
        }
    }
}

/// The emulator's process, killed on drop.
#[derive(Debug)]
struct Qemu {
    child: Mutex<Child>,
}

impl Qemu {
    fn ended(&self) -> Option<ExitStatus> {
        self.child
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .try_wait()
            .ok()
            .flatten()
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let child = self.child.get_mut().unwrap_or_else(PoisonError::into_inner);
        // It may have ended by itself.
        let _ = child.kill();
        let _ = child.wait();
    }
}

/// Copies the guest's console to a file and looks for a kernel panic.
fn watch_console(console: ChildStdout, mut file: File, log: &Mutex<Vec<String>>, shared: &Shared) {
    let mut reader = BufReader::new(console);
    let mut panic = None;
    let mut line = Vec::new();
    loop {
        line.clear();
        match reader.read_until(b'\n', &mut line) {
            Ok(0) | Err(_) => break,
            Ok(_) => {}
        }
        // The log is a help only: a full disk must not end the VM.
        let _ = file.write_all(&line);
        let text = String::from_utf8_lossy(&line).trim_end().to_owned();
        if panic.is_none() && text.contains("Kernel panic") {
            panic = Some(text.clone());
        }
        log.lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(text);
    }
    shared.end(|| panic.unwrap_or_else(|| "QEMU exited".to_owned()));
}

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
        VmBuilder {
            kernel: Kernel::V6_1,
            memory_mib: 3072,
            reserved: Some("960M!2G".to_owned()),
            cpus: 2,
            icount: false,
            interactive: false,
            append: Vec::new(),
            forward: Vec::new(),
            workspace: workspace.into(),
            keep: false,
            quiet: false,
        }
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

    /// Adds the console's end to errors that only it explains.
    fn explain(&self, error: ControlError) -> anyhow::Error {
        match error {
            ControlError::Dead(_) | ControlError::Timeout(_) => {
                let console = self.console_tail(40);
                anyhow::Error::new(error).context(format!("Console:\n{console}"))
            }
            error => error.into(),
        }
    }
}
