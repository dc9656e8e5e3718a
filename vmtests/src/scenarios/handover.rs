//! `tracker update` itself: the machine's own state, refusals, a broken image.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use super::single_case;
use super::{Kernels, Scenario};
use crate::image::Kernel;
use crate::protocol::Status;
use crate::vm::{Exec, Outcome, Vm};

/// The scenarios of this file.
pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "handover_machine",
        kernels: Kernels::Only(Kernel::V6_1),
        configure: |vm| vm,
        run: machine,
    },
    Scenario {
        name: "handover_no_arena",
        kernels: Kernels::Only(Kernel::V6_12),
        configure: |vm| vm.reserved(None),
        run: no_arena,
    },
    Scenario {
        name: "handover_one_session",
        kernels: Kernels::Only(Kernel::V6_1),
        configure: |vm| vm,
        run: one_session,
    },
];

const UPDATED: Kernel = Kernel::V6_12;

/// The command.
pub(super) fn update<'a>(kernel: &'a str, initrd: &'a str) -> [&'a str; 6] {
    ["tracker", "update", "--kernel", kernel, "--initrd", initrd]
}

/// Refusals change nothing; an update without applications keeps the machine's state.
fn machine(vm: &Vm) -> Result<()> {
    let (kernel, initrd) = (UPDATED.guest_vmlinuz()?, UPDATED.guest_initrd()?);
    let refused = |kernel: &str, code: i32| -> Result<()> {
        let output = vm.exec(Exec::new(update(kernel, &initrd)))?;
        let wanted = Status::Exited(code);
        ensure!(
            output.status == wanted,
            "Updating to {kernel}: {} {}, not {wanted}",
            output.status,
            output.error_text()
        );
        Ok(())
    };
    refused("/boot/missing", 3)?;
    volatile_file(vm, &kernel, &initrd)?;
    late_mount(vm, &kernel, &initrd)?;
    ring(vm, &kernel, &initrd)?;
    refused("/bin/ls", 4)?;
    let dry = [&update(&kernel, &initrd)[..], &["--dry-run", "--json"]].concat();
    let plan = vm.exec(Exec::new(dry))?.check()?;
    let plan: serde_json::Value = serde_json::from_str(&plan.text())?;
    ensure!(plan["arena"]["address"] == 0x8000_0000_u64, "{plan}");
    let loaded = "[ $(cat /sys/kernel/kexec_loaded) = 0 ]";
    vm.sh(loaded)?
        .check()
        .context("A kernel is still loaded after refusals and a dry run")?;

    let before = "hostname moved && ip addr add 10.9.8.7/29 dev eth0 && \
         ip route add 10.7.0.0/16 via 10.9.8.1 metric 5 && \
         sysctl -qw net.ipv4.ip_local_port_range='20000 30001' && echo kept > /root/kept";
    vm.sh(before)?.check()?;
    match vm.exec_or_reboot(Exec::new(update(&kernel, &initrd)))? {
        Outcome::Rebooted(hello) => ensure!(
            hello.release == UPDATED.release()?,
            "Now runs {}",
            hello.release
        ),
        Outcome::Exited(output) => bail!("{}: {}", output.status, output.error_text()),
    }
    let report: serde_json::Value =
        serde_json::from_slice(&vm.read_file("/run/tracker/update.json")?)?;
    ensure!(report["status"] == "done", "{report}");
    ensure!(
        report["kernel_before"] == Kernel::V6_1.release()?,
        "{report}"
    );
    ensure!(report["warnings"] == serde_json::json!([]), "{report}");
    for after in [
        "ip -4 addr show dev eth0 | grep -q 10.9.8.7/29",
        "ip -4 addr show dev eth0 | grep -q 10.0.2.15/24",
        "ip route | grep -q '10.7.0.0/16 via 10.9.8.1 dev eth0.*metric 5'",
        "ip route | grep -q 'default via 10.0.2.2'",
        "grep -q '20000.30001' /proc/sys/net/ipv4/ip_local_port_range",
        "grep -q kept /root/kept",
        "! dmesg | grep -q 'recovery'",
    ] {
        vm.sh(after)?.check().with_context(|| after.to_owned())?;
    }
    Ok(())
}

/// What would be gone afterwards is named before anything happens, also by `check`.
fn named_before(vm: &Vm, kernel: &str, initrd: &str, hold: &str, names: &[&str]) -> Result<()> {
    let hold = format!("tracker run --name holder -- {hold}");
    let pid = vm.spawn(Exec::new(["sh", "-c", &hold]), None)?;
    let there = vm.await_file("/run/volatile", std::time::Duration::from_secs(60))?;
    ensure!(there, "The holder does not run");
    for words in [&update(kernel, initrd)[..], &["tracker", "check", "holder"]] {
        let output = vm.exec(Exec::new(words.iter().copied()))?;
        let said = output.text() + &output.error_text();
        ensure!(
            output.status == Status::Exited(3) && names.iter().all(|name| said.contains(name)),
            "{words:?}: {} {said}",
            output.status
        );
    }
    vm.kill(pid, libc::SIGKILL)?;
    vm.sh("echo 1 >/sys/fs/cgroup/tracker/holder/cgroup.kill; rm /run/volatile")?;
    vm.wait(pid, std::time::Duration::from_secs(10))?;
    Ok(())
}

/// A file that lives in memory.
fn volatile_file(vm: &Vm, kernel: &str, initrd: &str) -> Result<()> {
    let hold = "sh -c 'exec 5>/run/volatile; exec sleep 1000'";
    named_before(vm, kernel, initrd, hold, &["fd 5: file volatile", "tmpfs"])
}

/// A mount namespace that sees what a machine has not mounted when an update restores.
fn late_mount(vm: &Vm, kernel: &str, initrd: &str) -> Result<()> {
    let hold = "unshare --mount sh -c 'echo >/run/volatile; exec sleep 1000'";
    let name = "mount /run/lock: what it shows is not there yet";
    named_before(vm, kernel, initrd, hold, &[name])
}

/// A ring that the next kernel would keep in another form, and one that it would not.
fn ring(vm: &Vm, kernel: &str, initrd: &str) -> Result<()> {
    single_case::start(vm, "uring_used")?;
    let own = (Kernel::V6_1.guest_vmlinuz()?, Kernel::V6_1.guest_initrd()?);
    for (kernel, initrd, code) in [(kernel, initrd, 3), (&*own.0, &*own.1, 0)] {
        let words = [&update(kernel, initrd)[..], &["--dry-run"]].concat();
        let output = vm.exec(Exec::new(words))?;
        let said = output.text() + &output.error_text();
        ensure!(
            output.status == Status::Exited(code)
                && (code == 0) != said.contains("io_uring: the next kernel"),
            "To {kernel}: {} {said}",
            output.status
        );
    }
    single_case::passes(vm)
}

/// Without reserved memory, it says so.
fn no_arena(vm: &Vm) -> Result<()> {
    let (kernel, initrd) = (UPDATED.guest_vmlinuz()?, UPDATED.guest_initrd()?);
    let output = vm.exec(Exec::new(update(&kernel, &initrd)))?;
    ensure!(output.status == Status::Exited(3), "{}", output.status);
    ensure!(
        output.error_text().contains("memmap="),
        "{}",
        output.error_text()
    );
    Ok(())
}

/// Three applications: the leader of a session, that of a group in it, and a member of both, who
/// is restored first.
const ONE_SESSION: &str = r#"
import os

def run(name):
    os.execvp("tracker", ["tracker", "run", "--name", name, "--", "sleep", "100000"])

leader = os.fork()
if leader == 0:
    os.setpgid(0, 0)
    run("y")
while os.getpgid(leader) != leader:
    pass
if os.fork() == 0:
    os.setpgid(0, leader)
    run("a")
run("z")
"#;

/// Nobody stands in for a leader that another application has.
fn one_session(vm: &Vm) -> Result<()> {
    let (kernel, initrd) = (UPDATED.guest_vmlinuz()?, UPDATED.guest_initrd()?);
    vm.spawn(Exec::new(["setsid", "python3", "-c", ONE_SESSION]), None)?;
    let three =
        "for i in $(seq 600); do [ $(pgrep -xc sleep) = 3 ] && exit 0; sleep 0.1; done; exit 1";
    vm.exec(Exec::new(["sh", "-c", three]).timeout(Duration::from_secs(100)))?
        .check()
        .context("Three programs")?;
    let pids = || Ok::<_, anyhow::Error>(vm.sh("pgrep -x sleep")?.check()?.text());
    let before = pids()?;
    match vm.exec_or_reboot(Exec::new(update(&kernel, &initrd)))? {
        Outcome::Rebooted(_) => {}
        Outcome::Exited(output) => bail!("{}: {}", output.status, output.error_text()),
    }
    let report = vm.read_file("/run/tracker/update.json")?;
    let report: serde_json::Value = serde_json::from_slice(&report)?;
    ensure!(report["status"] == "done", "{report}");
    let after = pids()?;
    ensure!(before == after, "PIDs were\n{before}and are\n{after}");
    Ok(())
}
