//! A VM's settings and QEMU's command line.

use std::fs::{self, File};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, bail};

use super::monitor::{Monitor, saved};
use super::qemu::{EXITED, Qemu, WorkDir, watch_console};
use super::template::{Template, Templates};
use super::{Exec, PATIENCE, Vm};
use crate::apps;
use crate::control::{Control, ControlError, Shared};
use crate::guest::init::SHELL_WORD;
use crate::image::{Image, Kernel};
use crate::payload::{self, Profile};
use crate::protocol::PORT_NAME;
use crate::slot::Slot;

/// Boots of one VM at most.
const ATTEMPTS: u32 = 3;

/// All that QEMU can emulate, but not "fast" string operations: it emulates `rep movsb` byte by
/// byte, and a kernel that takes it for fast clears and copies pages by it, eight times as slowly
/// as by other means. Real processors are fastest by it. Nor a fifth level of page tables, which
/// no machine here needs: each miss of the emulated TLB walks them, and tests take a fifth longer.
const CPU: &str = "max,-erms,-fsrm,-fsrs,-fsrc,-fzrm,-la57";

/// Settings of a VM that has not been started.
#[derive(Debug, Clone)]
pub struct VmBuilder {
    shape: Shape,
    interactive: bool,
    forward: Vec<u16>,
    templates: Option<Arc<Templates>>,
    scratch: Option<&'static str>,
    workspace: PathBuf,
    keep: bool,
    quiet: bool,
}

/// What one machine must have in common with a saved one to go on from it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Shape {
    kernel: Kernel,
    memory_mib: u32,
    reserved: Option<String>,
    cpus: u32,
    icount: bool,
    append: Vec<String>,
    profile: Profile,
    agent: bool,
}

/// Where a machine comes from.
#[derive(Debug, Clone, Copy)]
enum Origin<'a> {
    /// It boots, and its disk is forgotten in the end.
    Boot,
    /// It boots with this template's disk, and will be written there.
    Making(&'a Template),
    /// It is loaded.
    Saved(&'a Template),
}

impl Origin<'_> {
    /// The disk with our programs of the machine in `dir`.
    fn programs(self, dir: &WorkDir) -> PathBuf {
        match self {
            Origin::Boot => dir.programs(),
            Origin::Making(template) | Origin::Saved(template) => template.programs(),
        }
    }
}

impl VmBuilder {
    pub(super) fn new(workspace: PathBuf) -> VmBuilder {
        VmBuilder {
            shape: Shape {
                kernel: Kernel::V6_1,
                memory_mib: 3072,
                reserved: Some("960M!2G".to_owned()),
                cpus: 2,
                icount: false,
                append: Vec::new(),
                profile: Profile::Dev,
                agent: false,
            },
            interactive: false,
            forward: Vec::new(),
            templates: None,
            scratch: None,
            workspace,
            keep: false,
            quiet: false,
        }
    }

    /// The kernel that the VM boots first; 6.1 unless set.
    #[must_use]
    pub fn kernel(mut self, kernel: Kernel) -> Self {
        self.shape.kernel = kernel;
        self
    }

    /// Memory in MiB, 3072 unless set.
    #[must_use]
    pub fn memory_mib(mut self, memory: u32) -> Self {
        self.shape.memory_mib = memory;
        self
    }

    /// The `memmap=` reservation behind `/dev/pmem0`, `960M!2G` unless set.
    #[must_use]
    pub fn reserved(mut self, range: Option<&str>) -> Self {
        self.shape.reserved = range.map(str::to_owned);
        self
    }

    /// Number of virtual CPUs, 2 unless set.
    #[must_use]
    pub fn cpus(mut self, cpus: u32) -> Self {
        self.shape.cpus = cpus;
        self
    }

    /// Counts instructions instead of time: repeatable, one CPU only.
    #[must_use]
    pub fn icount(mut self, icount: bool) -> Self {
        self.shape.icount = icount;
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
        self.shape.append.push(word.to_owned());
        self
    }

    /// Makes a TCP port of the guest reachable: see [`Vm::port`].
    #[must_use]
    pub fn forward(mut self, port: u16) -> Self {
        self.forward.push(port);
        self
    }

    /// A third disk of this size (`64M`), an empty ext4 filesystem: `/dev/vdc`.
    #[must_use]
    pub fn scratch(mut self, size: &'static str) -> Self {
        self.scratch = Some(size);
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

    /// How our programs are compiled, for development unless set.
    #[must_use]
    pub fn profile(mut self, profile: Profile) -> Self {
        self.shape.profile = profile;
        self
    }

    /// The agent runs from the start: its model is compared with what each checkpoint reads, and
    /// its iterators are lent, which take seconds to load under emulation.
    #[must_use]
    pub fn agent(mut self) -> Self {
        self.shape.agent = true;
        self
    }

    /// All VMs of this builder's clones go on from the first one of their shape instead of booting,
    /// but with [`VmBuilder::scratch`] or [`VmBuilder::interactive`].
    #[must_use]
    pub fn boot_once(mut self) -> Self {
        self.templates = Some(Arc::default());
        self
    }

    pub(super) fn shape(&self) -> Shape {
        self.shape.clone()
    }

    pub(super) fn workspace(&self) -> &Path {
        &self.workspace
    }

    /// Builds our programs, boots, and waits for the guest's hello, and for the agent where there
    /// is to be one.
    ///
    /// # Errors
    /// If the image is missing, the build fails, or the guest or the agent does not come up.
    pub fn start(mut self) -> Result<Vm> {
        match self.templates.take() {
            Some(templates) if self.scratch.is_none() && !self.interactive => {
                let template = templates.get(&self)?;
                self.load(&template)
            }
            _ => self.boot(Origin::Boot),
        }
    }

    /// Boots a machine that will be saved as this template.
    pub(super) fn boot_template(self, template: &Template) -> Result<Vm> {
        self.boot(Origin::Making(template))
    }

    fn boot(self, origin: Origin) -> Result<Vm> {
        payload::build(&self.workspace, self.shape.profile)?;
        let mut left = ATTEMPTS;
        loop {
            left -= 1;
            let (begun, quiet) = (Instant::now(), self.quiet);
            let vm = self.clone().launch(origin)?;
            match vm.control.wait_for_hello(0, Duration::from_secs(120)) {
                Ok(hello) if quiet => drop(hello),
                Ok(hello) => eprintln!(
                    "vm: {} up after {:.1} s (guest: init {:.1} s, hello {:.1} s)",
                    hello.release,
                    begun.elapsed().as_secs_f32(),
                    Duration::from_millis(hello.init_ms).as_secs_f32(),
                    Duration::from_millis(hello.uptime_ms).as_secs_f32(),
                ),
                // One boot in a thousand or so: the emulated machine resets itself while the
                // kernel looks at its devices, and nothing of ours runs yet.
                Err(ControlError::Dead(reason)) if reason == EXITED && left > 0 => {
                    let said = vm.qemu_said();
                    let last = vm.console_tail(1);
                    eprintln!("vm: {reason} before the guest's hello, again: {said}{last}");
                    continue;
                }
                Err(error) => return Err(vm.explain(error)),
            }
            if self.shape.agent {
                apps::start_agent(&vm)?;
                apps::await_spare(&vm)?;
            }
            return Ok(vm);
        }
    }

    /// Goes on from a saved machine, or boots one if that does not go on.
    fn load(self, template: &Template) -> Result<Vm> {
        let (begun, quiet, release) = (Instant::now(), self.quiet, &template.hello.release);
        let vm = self.clone().launch(Origin::Saved(template))?;
        Monitor::connect(&vm.dir.monitor())
            .and_then(|mut monitor| monitor.resume_loaded())
            .with_context(|| vm.qemu_said())?;
        // As if it had booted now.
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?;
        let now = format!("@{}.{:09}", now.as_secs(), now.subsec_nanos());
        match vm.try_exec(Exec::new(["date", "--set", &now])) {
            Ok(output) => output.check()?,
            // Seen once in some thousands of loads: the timer of one emulated CPU never fires, and
            // nothing of ours runs yet.
            Err(error @ (ControlError::Timeout(_) | ControlError::Dead(_))) => {
                let last = vm.console_tail(1);
                eprintln!("vm: {release} does not go on, it boots: {error}{last}");
                drop(vm);
                return self.boot(Origin::Boot);
            }
            Err(error) => return Err(vm.explain(error)),
        };
        if !quiet {
            let seconds = begun.elapsed().as_secs_f32();
            eprintln!("vm: {release} goes on after {seconds:.1} s");
        }
        Ok(vm)
    }

    /// Starts the emulator.
    fn launch(self, origin: Origin) -> Result<Vm> {
        let slot = Slot::take()?;
        let dir = WorkDir::create(&self.workspace, self.keep)?;
        if !matches!(origin, Origin::Saved(_)) {
            let programs = self.shape.profile.directory(&self.workspace);
            let disk = origin.programs(&dir);
            payload::pack(&programs, &disk.with_extension("stage"), &disk)?;
        }
        let begun = Instant::now();
        let ports = self
            .forward
            .iter()
            .map(|&guest| Ok((guest, free_port()?)))
            .collect::<Result<Vec<_>>>()?;
        let socket = dir.path.join("control");
        let mut qemu = Command::new("qemu-system-x86_64");
        self.arguments(&mut qemu, &dir, &ports, origin)?;
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
        if let Origin::Saved(template) = origin {
            shared.greet(template.hello.clone());
            log.lock()
                .unwrap_or_else(PoisonError::into_inner)
                .clone_from(&template.log);
        }
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
        Ok(Vm {
            control,
            qemu,
            log,
            ports,
            dir,
            settings: self,
            _slot: slot,
        })
    }

    fn arguments(
        &self,
        qemu: &mut Command,
        dir: &WorkDir,
        ports: &[(u16, u16)],
        origin: Origin,
    ) -> Result<()> {
        let image = Image::locate()?;
        if self.shape.icount {
            qemu.args([
                "-accel",
                "tcg,thread=single",
                "-icount",
                "shift=0,sleep=off",
                "-smp",
                "1",
            ]);
        } else {
            qemu.args([
                "-accel",
                "tcg,thread=multi",
                "-smp",
                &self.shape.cpus.to_string(),
            ]);
        }
        qemu.args(["-cpu", CPU, "-m", &format!("{}M", self.shape.memory_mib)]);
        // A reset ends QEMU: a panicking kernel (panic=-1) must not boot again.
        qemu.args([
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-no-reboot",
        ]);
        qemu.arg("-kernel").arg(image.vmlinuz(self.shape.kernel)?);
        qemu.arg("-initrd").arg(image.initrd(self.shape.kernel)?);
        qemu.args(["-append", &self.command_line()]);
        // Changes to the root disk go to a nameless temporary file, or to the template.
        let disk = match origin {
            Origin::Boot => format!("file={},format=raw,snapshot=on", path(&image.root())?),
            Origin::Making(template) => format!("file={},format=qcow2", path(&template.disk())?),
            Origin::Saved(template) => {
                format!("file={},format=qcow2,snapshot=on", path(&template.disk())?)
            }
        };
        qemu.args(["-drive", &format!("{disk},if=none,id=root,cache=unsafe")]);
        qemu.args(["-device", "virtio-blk-pci,drive=root"]);
        qemu.args([
            "-drive",
            &format!(
                "file={},format=raw,if=none,id=programs,readonly=on",
                path(&origin.programs(dir))?
            ),
        ]);
        qemu.args(["-device", "virtio-blk-pci,drive=programs"]);
        if !matches!(origin, Origin::Boot) {
            let socket = format!("unix:{},server=on,wait=off", path(&dir.monitor())?);
            qemu.args(["-qmp", &socket]);
        }
        if let Origin::Saved(template) = origin {
            qemu.args(["-incoming", &saved(path(&template.memory())?)]);
        }
        if let Some(size) = self.scratch {
            let file = dir.path.join("scratch.img");
            make_filesystem(&file, size)?;
            let drive = "format=raw,if=none,id=scratch,cache=unsafe";
            qemu.args(["-drive", &format!("file={},{drive}", path(&file)?)]);
            qemu.args(["-device", "virtio-blk-pci,drive=scratch"]);
        }
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
                path(&dir.path.join("control"))?
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
        words.extend(
            self.shape
                .reserved
                .iter()
                .map(|range| format!("memmap={range}")),
        );
        if self.interactive {
            words.push(SHELL_WORD.to_owned());
        }
        words.extend(self.shape.append.iter().cloned());
        words.join(" ")
    }
}

/// A path as QEMU's options take it.
pub(super) fn path(path: &Path) -> Result<&str> {
    path.to_str()
        .filter(|text| !text.contains(','))
        .with_context(|| format!("QEMU cannot take the path {}", path.display()))
}

/// An empty ext4 filesystem in a file.
fn make_filesystem(file: &Path, size: &str) -> Result<()> {
    // Users other than root may not have it on their path.
    let path = std::env::var("PATH").unwrap_or_default();
    let output = Command::new("mke2fs")
        .env("PATH", format!("{path}:/usr/sbin:/sbin"))
        .args(["-q", "-t", "ext4"])
        .arg(file)
        .arg(size)
        .output()
        .context("Run mke2fs (see `cargo xtask setup`)")?;
    if !output.status.success() {
        bail!("mke2fs: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}

/// A free port of the loopback device, free at least right now.
fn free_port() -> Result<u16> {
    Ok(TcpListener::bind(("127.0.0.1", 0))
        .context("Find a free port")?
        .local_addr()?
        .port())
}
