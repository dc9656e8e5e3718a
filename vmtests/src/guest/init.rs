//! PID 1: mounts, modules, network, then the control agent.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;

use nix::mount::{MsFlags, mount};
use nix::sys::reboot::{RebootMode, reboot};

use super::reaper::Reaper;
use super::{agent, cgroup_bpf, waker};

/// PIDs of tests start above those that the next kernel's threads will hold.
const FIRST_PID: u32 = 20_000;

/// Kernel command line word that asks for a shell on the serial console.
pub const SHELL_WORD: &str = "tracker.shell";

/// Where, type, options of the filesystems that a distribution's init mounts.
const MOUNTS: &[(&str, &str, &str)] = &[
    ("/proc", "proc", ""),
    ("/sys", "sysfs", ""),
    ("/dev", "devtmpfs", "mode=0755"),
    ("/dev/pts", "devpts", "mode=0620,gid=5,ptmxmode=0666"),
    ("/dev/shm", "tmpfs", "mode=1777"),
    ("/dev/mqueue", "mqueue", ""),
    ("/dev/hugepages", "hugetlbfs", ""),
    ("/run", "tmpfs", "mode=0755"),
    ("/run/lock", "tmpfs", "mode=1777"),
    ("/sys/fs/cgroup", "cgroup2", ""),
    ("/sys/fs/bpf", "bpf", "mode=0700"),
    ("/sys/kernel/security", "securityfs", ""),
    ("/sys/kernel/tracing", "tracefs", ""),
    ("/sys/kernel/debug", "debugfs", ""),
];

const MODULES: &[&str] = &["virtio_net", "virtio_console", "nd_e820", "nd_pmem"];

/// Runs for ever.
pub fn main() -> ! {
    let started = uptime_ms();
    if std::process::id() == 1 {
        mount_missing();
        hostname();
        first_pid();
        load_modules();
        network();
        if let Err(error) = cgroup_bpf::keep_enabled() {
            say(&format!("Keep cgroup BPF enabled: {error:#}"));
        }
    }
    if let Err(error) = waker::start() {
        say(&format!("Wake the CPUs: {error}"));
    }
    let reaper = Reaper::start();
    if fs::read_to_string("/proc/cmdline")
        .is_ok_and(|line| line.split_whitespace().any(|w| w == SHELL_WORD))
    {
        let reaper = Arc::clone(&reaper);
        std::thread::spawn(move || shell(&reaper));
    }
    loop {
        if let Err(error) = agent::serve(&reaper, started) {
            say(&format!("control channel: {error:#}"));
        }
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
}

/// Milliseconds since the kernel started.
pub fn uptime_ms() -> u64 {
    nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME).map_or(0, |t| {
        t.tv_sec().unsigned_abs() * 1000 + t.tv_nsec().unsigned_abs() / 1_000_000
    })
}

/// Prints a line on the console.
fn say(text: &str) {
    eprintln!("guestd: {text}");
}

fn mount_missing() {
    for &(target, kind, options) in MOUNTS {
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
        if mounts
            .lines()
            .any(|line| line.split(' ').nth(1) == Some(target))
        {
            continue;
        }
        if !Path::new(target).is_dir()
            && let Err(error) = fs::create_dir_all(target)
        {
            say(&format!("Create {target}: {error}"));
            continue;
        }
        let options = if options.is_empty() {
            None
        } else {
            Some(options)
        };
        if let Err(error) = mount(Some(kind), target, Some(kind), MsFlags::empty(), options) {
            say(&format!("Mount {kind} on {target}: {error}"));
        }
    }
}

fn hostname() {
    let name = fs::read_to_string("/etc/hostname").unwrap_or_default();
    if let Err(error) = nix::unistd::sethostname(name.trim()) {
        say(&format!("Set the host name: {error}"));
    }
}

fn first_pid() {
    let path = "/proc/sys/kernel/ns_last_pid";
    let last: u32 = fs::read_to_string(path)
        .ok()
        .and_then(|text| text.trim().parse().ok())
        .unwrap_or(0);
    if last < FIRST_PID
        && let Err(error) = fs::write(path, FIRST_PID.to_string())
    {
        say(&format!("Write {path}: {error}"));
    }
}

fn load_modules() {
    let missing: Vec<_> = MODULES
        .iter()
        .filter(|name| !Path::new("/sys/module").join(name).exists())
        .collect();
    // The last ones exist as files only where there is such memory to drive.
    if !missing.is_empty() {
        let mut command = Command::new("modprobe");
        command.arg("-a").args(missing).stderr(Stdio::null());
        if let Err(error) = command.status() {
            say(&format!("Run modprobe: {error}"));
        }
    }
}

/// Addresses QEMU's user network expects, where none is configured yet.
fn network() {
    ip("link set lo up");
    if !Path::new("/sys/class/net/eth0").exists() {
        return;
    }
    if !ip_shows("-4 addr show dev eth0", "inet ") {
        ip("addr add 10.0.2.15/24 dev eth0");
    }
    ip("link set eth0 up");
    if !ip_shows("route show default", "default") {
        ip("route add default via 10.0.2.2");
    }
}

fn ip(arguments: &str) {
    match Command::new("ip").args(arguments.split(' ')).status() {
        Ok(status) if status.success() => {}
        Ok(status) => say(&format!("ip {arguments}: {status}")),
        Err(error) => say(&format!("Run ip: {error}")),
    }
}

fn ip_shows(arguments: &str, text: &str) -> bool {
    Command::new("ip")
        .args(arguments.split(' '))
        .output()
        .is_ok_and(|output| String::from_utf8_lossy(&output.stdout).contains(text))
}

/// A login shell on the console; the VM ends with it.
fn shell(reaper: &Reaper) {
    let tty = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/ttyS0");
    let mut command = Command::new("setsid");
    command.args(["--ctty", "bash", "--login"]);
    command
        .env("TERM", "xterm")
        .env("HOME", "/root")
        .current_dir("/root");
    if let Ok(tty) = tty
        && let (Ok(out), Ok(err)) = (tty.try_clone(), tty.try_clone())
    {
        command.stdin(tty).stdout(out).stderr(err);
    }
    match reaper.spawn(&mut command) {
        Ok(pid) => {
            while reaper
                .wait(pid, std::time::Duration::from_secs(3600))
                .is_none()
            {}
            nix::unistd::sync();
            let Err(error) = reboot(RebootMode::RB_POWER_OFF);
            say(&format!("Power off: {error}"));
        }
        Err(error) => say(&format!("Start a shell: {error}")),
    }
}
