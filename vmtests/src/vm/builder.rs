//! A VM's settings and QEMU's command line.

use std::fs::{self, File};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::qemu::{EXITED, Qemu, WorkDir, watch_console};
use super::{PATIENCE, Vm};
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
/// as by other means. Real processors are fastest by it.
const CPU: &str = "max,-erms,-fsrm";

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
    scratch: Option<&'static str>,
    workspace: PathBuf,
    keep: bool,
    quiet: bool,
    profile: Profile,
}

impl VmBuilder {
    pub(super) fn new(workspace: PathBuf) -> VmBuilder {
        VmBuilder {
            kernel: Kernel::V6_1,
            memory_mib: 3072,
            reserved: Some("960M!2G".to_owned()),
            cpus: 2,
            icount: false,
            interactive: false,
            append: Vec::new(),
            forward: Vec::new(),
            scratch: None,
            workspace,
            keep: false,
            quiet: false,
            profile: Profile::Dev,
        }
    }

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
        self.profile = profile;
        self
    }

    /// Builds our programs, boots, and waits for the guest's hello.
    ///
    /// # Errors
    /// If the image is missing, the build fails or the guest does not come up.
    pub fn start(self) -> Result<Vm> {
        payload::build(&self.workspace, self.profile)?;
        let mut left = ATTEMPTS;
        loop {
            left -= 1;
            let (begun, quiet) = (Instant::now(), self.quiet);
            let vm = self.clone().launch()?;
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
            return Ok(vm);
        }
    }

    /// Starts the emulator.
    fn launch(self) -> Result<Vm> {
        let slot = Slot::take()?;
        let dir = WorkDir::create(&self.workspace, self.keep)?;
        payload::pack(
            &self.profile.directory(&self.workspace),
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
        qemu.args(["-cpu", CPU, "-m", &format!("{}M", self.memory_mib)]);
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
        if let Some(size) = self.scratch {
            let file = dir.join("scratch.img");
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
fn path(path: &Path) -> Result<&str> {
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
