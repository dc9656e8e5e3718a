//! What the harness promises to everything else.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use super::{Kernels, Scenario};
use crate::image::Kernel;
use crate::payload::TESTS_DIR;
use crate::vm::{Exec, Outcome, Vm};

/// The scenarios of this file.
pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "harness_kexec",
        kernels: Kernels::Only(Kernel::V6_1),
        configure: |vm| vm.forward(REDIS),
        run: kexec,
    },
    Scenario {
        name: "harness_panic",
        kernels: Kernels::Only(Kernel::V6_12),
        configure: |vm| vm,
        run: panic,
    },
];

const REDIS: u16 = 6379;

/// What runs before `/sbin/init` under the next kernel, as `tracker` will: it
/// leaves a process and an address behind.
const EARLY: &str = r#"#!/bin/sh
sleep 1000 >/dev/null 2>&1 &
echo $! >/run/early.pid
ip link set eth0 up
ip addr add 10.0.2.15/24 dev eth0
ip addr add 10.0.2.99/32 dev eth0
exec /sbin/init
"#;

/// Disk, control channel and port forwarding outlive a kernel, and the guest's
/// init disturbs nothing that ran before it.
fn kexec(vm: &Vm) -> Result<()> {
    vm.write_file("/root/mark", b"before")?;
    redis_answers(vm).context("Before the kexec")?;
    let before = vm.hello();
    let next = Kernel::V6_12;
    let append = String::from_utf8(vm.read_file("/proc/cmdline")?)?;
    let append = format!("{} init=/root/early", append.trim());
    vm.write_file("/root/early", EARLY.as_bytes())?;
    vm.sh("chmod +x /root/early")?.check()?;
    let guestd = format!("{TESTS_DIR}/guestd");
    let (kernel, initrd) = (next.guest_vmlinuz()?, next.guest_initrd()?);
    let command = Exec::new([guestd.as_str(), "kexec", &kernel, &initrd, &append]);
    match vm.exec_or_reboot(command)? {
        Outcome::Rebooted(hello) => {
            ensure!(
                hello.release == next.release()?,
                "Now runs {}",
                hello.release
            );
            ensure!(
                hello.boot_id != before.boot_id,
                "The boot id has not changed"
            );
        }
        Outcome::Exited(output) => bail!("{}: {}", output.status, output.error_text()),
    }
    ensure!(vm.boots() == 2, "{} boots", vm.boots());
    let mark = vm.read_file("/root/mark")?;
    ensure!(
        mark == b"before",
        "The disk lost what was written: {mark:?}"
    );
    let early = "[ \"$(ps -o ppid=,comm= -p $(cat /run/early.pid) | xargs)\" = '1 sleep' ]";
    vm.sh(early)?
        .check()
        .context("The process from before init")?;
    vm.sh("ip addr show dev eth0 | grep -q 10.0.2.99/32")?
        .check()
        .context("The address from before init")?;
    redis_answers(vm).context("After the kexec")
}

/// Starts redis and talks to it from the host's loopback.
fn redis_answers(vm: &Vm) -> Result<()> {
    let port = REDIS.to_string();
    let server = [
        "redis-server",
        "--port",
        &port,
        "--protected-mode",
        "no",
        "--save",
        "",
    ];
    let pid = vm.spawn(Exec::new(server), Some("/root/redis.log"))?;
    let up = "until redis-cli ping 2>/dev/null | grep -q PONG; do sleep 0.1; done";
    vm.sh(up)?.check()?;
    let mut client = TcpStream::connect(("127.0.0.1", vm.port(REDIS)))?;
    client.set_read_timeout(Some(Duration::from_secs(20)))?;
    client.write_all(b"PING\r\n")?;
    let mut answer = [0; 7];
    client.read_exact(&mut answer)?;
    ensure!(&answer == b"+PONG\r\n", "Redis said {answer:?}");
    vm.kill(pid, libc::SIGKILL)?;
    ensure!(
        vm.wait(pid, Duration::from_secs(10))?.is_some(),
        "Redis did not die"
    );
    Ok(())
}

/// A kernel panic is told at once and by name.
fn panic(vm: &Vm) -> Result<()> {
    let crash = "sleep 0.2; echo c > /proc/sysrq-trigger";
    let Err(error) = vm.exec(Exec::new(["sh", "-c", crash])) else {
        bail!("The guest answered after a panic");
    };
    let text = format!("{error:#}");
    ensure!(
        text.contains("Kernel panic"),
        "The error does not tell of the panic: {text}"
    );
    Ok(())
}
