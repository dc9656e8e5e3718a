//! After the kexec something does not come back: the rest does, the machine boots, the image
//! stays, and everybody is told.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::handover::update as update_to;
use super::services::PATIENCE;
use super::{Kernels, Scenario};
use crate::apps;
use crate::image::Kernel;
use crate::load::{Connection, Load, Protocol};
use crate::vm::{Exec, Outcome, Vm};

/// The scenarios of this file.
pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "restore_fails_for_one",
        kernels: Kernels::Only(Kernel::V6_1),
        configure: |vm| apps::forwarded(vm).agent(),
        run: |vm| one_is_lost(vm, "restore-release@redis", "RestoreRelease"),
    },
    Scenario {
        name: "restore_hangs_for_one",
        kernels: Kernels::Only(Kernel::V6_1),
        configure: |vm| apps::forwarded(vm).agent(),
        run: |vm| one_is_lost(vm, "restore-files@redis:hang", "not done after 20 s"),
    },
    Scenario {
        name: "restore_hangs",
        kernels: Kernels::Only(Kernel::V6_1),
        configure: apps::forwarded,
        run: stage_hangs,
    },
    Scenario {
        name: "restore_image_damaged",
        kernels: Kernels::Only(Kernel::V6_1),
        configure: apps::forwarded,
        run: image_damaged,
    },
];

const NEXT: Kernel = Kernel::V6_12;

/// The device that the image is left on.
const ARENA: &str = "/dev/pmem0";

/// Updates; whatever becomes of the applications, the machine must be there.
pub(super) fn update(vm: &Vm, more: &[&str]) -> Result<Value> {
    let (kernel, initrd) = (NEXT.guest_vmlinuz()?, NEXT.guest_initrd()?);
    let words = [&update_to(&kernel, &initrd)[..], more];
    match vm.exec_or_reboot(Exec::new(words.concat()).timeout(PATIENCE))? {
        Outcome::Rebooted(hello) => ensure!(
            hello.release == NEXT.release()?,
            "The guest now runs {}",
            hello.release
        ),
        Outcome::Exited(output) => bail!("{}: {}", output.status, output.error_text()),
    }
    let report = vm.read_file("/run/tracker/update.json")?;
    Ok(serde_json::from_slice(&report)?)
}

/// The report's entry about one application.
fn entry<'a>(report: &'a Value, name: &str) -> Result<&'a Value> {
    let entries = report["applications"].as_array();
    let found = entries.and_then(|list| list.iter().find(|app| app["name"] == name));
    found.with_context(|| format!("No {name} in {report}"))
}

/// What `tracker status` and the metrics say, by a fresh agent.
fn told(vm: &Vm) -> Result<(String, String)> {
    let agent = ["tracker", "agent", "--metrics-listen", "127.0.0.1:9469"];
    vm.spawn(Exec::new(agent), Some("/root/agent.log"))?;
    let socket = "/run/tracker/agent.sock";
    ensure!(
        vm.await_file(socket, Duration::from_secs(60))?,
        "The agent did not start"
    );
    let status = vm.exec(Exec::new(["tracker", "status"]))?.check()?.text();
    let get = "exec 3<>/dev/tcp/127.0.0.1/9469; printf 'GET /metrics HTTP/1.0\\r\\n\\r\\n' >&3; \
               cat <&3";
    let metrics = vm.exec(Exec::new(["bash", "-c", get]))?.check()?.text();
    Ok((status, metrics))
}

/// Redis is not restored: it is started afresh, and the clients of memcached notice nothing.
fn one_is_lost(vm: &Vm, fault: &str, reason: &str) -> Result<()> {
    apps::start_redis(vm, 5)?;
    apps::start_memcached(vm)?;
    let load = Load::start(&apps::targets(vm, 0, 10))?;
    load.progress(10, PATIENCE).context("Before")?;
    let [redis, memcached] = ["redis", "memcached"].map(|name| apps::pids(vm, name));
    let (redis, memcached) = (redis?, memcached?);

    let fault = format!("TRACKER_FAULT={fault}");
    let report = update(vm, &["--restore-deadline", "20", "--append", &fault])?;

    ensure!(report["status"] == "partial", "{report}");
    ensure!(report["verification"]["differing"] == 0, "{report}");
    let lost = entry(&report, "redis")?;
    ensure!(lost["status"] == "restarted", "{report}");
    let said = lost["error"].as_str().unwrap_or_default();
    ensure!(said.contains(reason), "{report}");
    ensure!(
        entry(&report, "memcached")?["status"] == "restored",
        "{report}"
    );

    ensure!(
        apps::pids(vm, "memcached")? == memcached,
        "memcached has other PIDs"
    );
    load.progress(20, PATIENCE)
        .context("memcached afterwards")?;
    let summary = load.finish();
    ensure!(summary.clean(), "{summary:#?}");

    let mut fresh = Connection::open(Protocol::Redis, vm.port(apps::REDIS))?;
    let size = fresh.call(&[b"DBSIZE"])?;
    ensure!(size == ":0", "A redis started afresh has {size:?} keys");
    let now = apps::pids(vm, "redis")?;
    ensure!(now != redis, "Redis was not started afresh: {now:?}");

    let image = vm
        .exec(Exec::new(["tracker", "inspect", ARENA]))?
        .check()?
        .text();
    ensure!(image.contains("redis ("), "The image was not kept: {image}");
    let (status, metrics) = told(vm)?;
    ensure!(
        status.contains("PARTIAL") && status.contains(reason),
        "The status does not tell: {status}"
    );
    for line in [
        "tracker_update_applications{outcome=\"restarted\"} 1",
        "tracker_update_applications{outcome=\"restored\"} 1",
        "tracker_update_done 0",
    ] {
        ensure!(
            metrics.contains(line),
            "No {line} in the metrics:\n{metrics}"
        );
    }
    Ok(())
}

/// Nothing is restored: the machine boots without, and says so.
fn nothing_restored(vm: &Vm, report: &Value, reason: &str) -> Result<()> {
    ensure!(report["status"] == "failed", "{report}");
    ensure!(report["warnings"].to_string().contains(reason), "{report}");
    ensure!(
        apps::pids(vm, "memcached").is_err(),
        "Something runs in memcached's cgroup"
    );
    let (status, metrics) = told(vm)?;
    ensure!(
        status.contains("FAILED") && status.contains(reason),
        "The status does not tell: {status}"
    );
    ensure!(
        metrics.contains("tracker_update_done 0"),
        "The metrics do not tell:\n{metrics}"
    );
    // Nothing keeps the network locked.
    apps::start_memcached(vm)
}

fn stage_hangs(vm: &Vm) -> Result<()> {
    apps::start_memcached(vm)?;
    let fault = [
        "--restore-deadline",
        "1",
        "--append",
        "TRACKER_FAULT=stage:hang",
    ];
    let report = update(vm, &fault)?;
    nothing_restored(vm, &report, "not done after 62 s")?;
    let image = vm
        .exec(Exec::new(["tracker", "inspect", ARENA]))?
        .check()?
        .text();
    ensure!(
        image.contains("memcached ("),
        "The image was not kept: {image}"
    );
    Ok(())
}

/// Changes one byte in the middle of the metadata before the early stage reads it.
const DAMAGE: &str = r#"#!/bin/sh
modprobe -a nd_e820 nd_pmem
until [ -b /dev/pmem0 ]; do sleep 0.1; done
word() { od -An -tu8 -j"$1" -N8 /dev/pmem0 | tr -d ' '; }
at=$(($(word 12) + $(word 20) / 2))
old=$(od -An -tu1 -j$at -N1 /dev/pmem0 | tr -d ' ')
printf "\\$(printf %o $((old ^ 1)))" | dd of=/dev/pmem0 bs=1 seek=$at conv=notrunc,fsync
exec /usr/bin/tracker "$@"
"#;

fn image_damaged(vm: &Vm) -> Result<()> {
    apps::start_memcached(vm)?;
    let early = "/usr/lib/tracker/early";
    vm.write_file("/root/damage", DAMAGE.as_bytes())?;
    vm.sh(&format!("chmod +x /root/damage && mv /root/damage {early}"))?
        .check()?;
    let report = update(vm, &[])?;
    nothing_restored(vm, &report, "checksum")?;
    let inspect = vm.exec(Exec::new(["tracker", "inspect", ARENA]))?;
    ensure!(
        inspect.code() == Some(5) && inspect.error_text().contains("checksum"),
        "Inspecting it: {} {}",
        inspect.status,
        inspect.error_text()
    );
    Ok(())
}
