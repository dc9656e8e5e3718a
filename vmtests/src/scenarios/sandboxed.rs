//! Services in mount namespaces as systemd makes them for `PrivateTmp=`, `PrivateDevices=`,
//! `ProtectSystem=`, `ProtectHome=`, `ProtectProc=` and `ProtectHostname=`.

use anyhow::{Context, Result, ensure};

use super::services::{PATIENCE, all_well};
use super::way_back::update;
use super::{Kernels, Scenario};
use crate::apps;
use crate::image::Kernel;
use crate::load::Load;
use crate::vm::Vm;

/// The scenarios of this file.
pub const SCENARIOS: &[Scenario] = &[Scenario {
    name: "sandboxed_update",
    kernels: Kernels::Only(Kernel::V6_1),
    configure: apps::forwarded,
    run: updated,
}];

/// Executes its arguments in a sandbox.
const SANDBOX: &str = r#"#!/bin/sh
set -e
hostname sandboxed
mount -o bind,ro /usr /usr
mkdir -p /tmp/private.$$ /run/new.$$ /root/nothing
mount -o bind,nosuid /tmp/private.$$ /tmp
mount -o bind,ro /root/nothing /home
mount -t tmpfs -o mode=755,size=4m,nosuid,noexec tmpfs /run/new.$$
cd /run/new.$$
cp -a /dev/null /dev/zero /dev/full /dev/random /dev/urandom .
mkdir pts shm mqueue
for shared in pts shm mqueue; do mount --bind /dev/$shared $shared; done
ln -s /proc/self/fd fd
cd /
mount --move /run/new.$$ /dev
mount -o remount,bind,ro,nosuid,noexec /dev
mount -t proc -o hidepid=invisible,nosuid,nodev,noexec proc /proc
exec "$@"
"#;

const PATH: &str = "/root/sandbox";

/// What each of the servers sees: its host name, its mounts but for numbers, its devices.
const SEEN: &str = r#"
    for server in redis-server memcached; do
        nsenter -t $(pidof $server) -m -u sh -c '
            hostname
            cut -d" " -f 4-6 /proc/self/mountinfo | sort
            stat -c "%n %A %U %G %t %T" /dev/*
            cat /tmp/own'
    done"#;

/// Two sandboxed services with clients, across the kexec.
fn updated(vm: &Vm) -> Result<()> {
    vm.write_file(PATH, SANDBOX.as_bytes())?;
    // As init does on machines with systemd.
    vm.sh(&format!("chmod +x {PATH} && mount --make-rshared /"))?
        .check()?;
    let starter = [
        "unshare",
        "--mount",
        "--uts",
        "--propagation",
        "slave",
        PATH,
    ];
    apps::start_redis_by(vm, &starter, 20)?;
    apps::start_memcached_by(vm, &starter)?;
    let own = r#"
        for server in redis-server memcached; do
            nsenter -t $(pidof $server) -m sh -c "echo $server >/tmp/own"
        done"#;
    vm.sh(own)?.check().context("Files in /tmp")?;
    let seen = || Ok::<_, anyhow::Error>(vm.sh(SEEN)?.check()?.text());
    let before = seen()?;
    ensure!(before.contains("sandboxed"), "{before}");
    let load = Load::start(&apps::targets(vm, 20, 10))?;
    load.progress(10, PATIENCE).context("Before")?;

    let report = update(vm, &[])?;
    ensure!(report["status"] == "done", "{report}");

    let after = seen()?;
    let lines = |text: &str| text.lines().map(str::to_owned).collect::<Vec<_>>();
    let (old, new) = (lines(&before), lines(&after));
    let missing: Vec<_> = old.iter().filter(|line| !new.contains(line)).collect();
    let more: Vec<_> = new.iter().filter(|line| !old.contains(line)).collect();
    ensure!(old == new, "Missing: {missing:#?}, new: {more:#?}");
    let outside = vm.sh("hostname; ls /tmp/own /dev/console")?.text();
    ensure!(!outside.contains("sandboxed"), "It got out: {outside}");
    ensure!(outside.contains("/dev/console"), "The machine's: {outside}");
    all_well(vm, load)
}
