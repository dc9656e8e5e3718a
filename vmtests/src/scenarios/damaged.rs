//! Images that are damaged are refused whoever reads them, and nothing comes of it; images that
//! exist are not written to.

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::services::PATIENCE;
use super::{Kernels, Scenario};
use crate::apps;
use crate::image::Kernel;
use crate::vm::{Exec, Output, Vm};

/// The scenarios of this file.
pub const SCENARIOS: &[Scenario] = &[Scenario {
    name: "damaged_images",
    kernels: Kernels::Only(Kernel::V6_12),
    configure: apps::forwarded,
    run: images,
}];

/// Exit code for "image invalid".
const INVALID: i32 = 5;

/// Exit code for a wrong command line.
const USAGE: i32 = 2;

/// Megabytes of data in redis.
const DATA: usize = 5;

const IMAGE: &str = "/root/image";

fn images(vm: &Vm) -> Result<()> {
    apps::start_redis(vm, DATA)?;
    not_overwritten(vm).context("Where something is already")?;
    let checkpoint = apps::checkpoint("redis", IMAGE, &[]).timeout(PATIENCE);
    vm.exec(checkpoint)?.check()?;
    let length = vm.sh(&format!("stat -c %s {IMAGE}/metadata"))?.check()?;
    let length: u64 = length.text().trim().parse()?;
    // The header, a record's frame, the middle, the seal.
    for at in [8, 12, 24, 30, 40, length / 3, length / 2, length - 1] {
        refused(vm, &format!("bit of {at}"), &flip("metadata", at))?;
    }
    refused(vm, "cut", &cut("metadata", length / 2))?;
    refused(vm, "without its last byte", &cut("metadata", length - 1))?;
    refused(vm, "empty", &cut("metadata", 0))?;
    refused(vm, "without metadata", "rm metadata")?;
    refused(vm, "without pages", "rm pages")?;
    let files = vm.sh(&format!("ls {IMAGE} | grep -c ^pages"))?.check()?;
    let files: u64 = files.text().trim().parse()?;
    for slot in slots(vm)? {
        let (file, at) = place(slot, files);
        refused(vm, &format!("bit of slot {slot}"), &flip(&file, at + 1234))?;
    }
    refused(vm, "without its last pages", &cut("pages", 4096))?;
    refused(vm, "without a file of pages", "rm pages.1")?;
    refused(vm, "one file of pages for another", "mv -f pages.2 pages.1")?;
    // The connections' lock is still there, and the image itself is as good as ever.
    let restore = ["tracker", "restore", "--image", IMAGE, "--detach"];
    vm.exec(Exec::new(restore).timeout(PATIENCE))?.check()?;
    apps::check_redis_data(vm, DATA)
}

/// Turns one bit.
fn flip(file: &str, at: u64) -> String {
    format!(
        "python3 -c \"f = open('{file}', 'r+b'); f.seek({at}); b = f.read(1)[0]; \
         f.seek({at}); f.write(bytes([b ^ 4]))\""
    )
}

/// In which file a slot lies and where, if there are so many (docs/image-format.md).
fn place(slot: u64, files: u64) -> (String, u64) {
    const STRIPE: u64 = 128;
    let (stripe, inside) = (slot / STRIPE, slot % STRIPE);
    let file = match stripe % files {
        0 => "pages".to_owned(),
        number => format!("pages.{number}"),
    };
    (file, (stripe / files * STRIPE + inside) * 4096)
}

fn cut(file: &str, length: u64) -> String {
    format!("truncate -s {length} {file}")
}

/// Slots that something points to: the first and the last of each address space.
fn slots(vm: &Vm) -> Result<Vec<u64>> {
    let inspect = vm.exec(Exec::new(["tracker", "inspect", "--json", IMAGE]))?;
    let image: Value = serde_json::from_str(&inspect.check()?.text())?;
    let mms = image["applications"][0]["mms"].as_object();
    let mut slots = Vec::new();
    for mm in mms.context("No address spaces")?.values() {
        let runs = mm["pages"].as_array().context("No pages")?;
        for run in [runs.first(), runs.last()].into_iter().flatten() {
            slots.push(run["slot"].as_u64().context("No slot")?);
        }
    }
    ensure!(
        slots.len() >= 2,
        "The image has only these slots: {slots:?}"
    );
    Ok(slots)
}

/// A copy of the image, changed by a script, is refused by all that read it.
fn refused(vm: &Vm, what: &str, change: &str) -> Result<()> {
    let copy = "/root/damaged";
    vm.sh(&format!(
        "rm -rf {copy} && cp -a {IMAGE} {copy} && cd {copy} && {change}"
    ))?
    .check()?;
    for command in [
        &["tracker", "inspect", copy][..],
        &["tracker", "inspect", "--json", copy],
        &["tracker", "restore", "--detach", "--image", copy],
    ] {
        let output = vm.exec(Exec::new(command.iter().copied()).timeout(PATIENCE))?;
        let shown = || {
            format!(
                "{what}: {command:?}: {}{}",
                output.text(),
                output.error_text()
            )
        };
        ensure!(
            output.code() == Some(INVALID),
            "{}, {}",
            output.status,
            shown()
        );
        ensure!(
            output.text().is_empty(),
            "Something is printed: {}",
            shown()
        );
        ensure!(output.error_text().starts_with("tracker: "), "{}", shown());
    }
    let left = vm.sh("pidof redis-server; cat /sys/fs/cgroup/tracker/redis/cgroup.procs 2>&-")?;
    ensure!(left.text().is_empty(), "{what}: PID {} runs", left.text());
    Ok(())
}

/// The image there, an empty directory or a link: a checkpoint keeps away from all of them, and
/// only the caller may read the one it makes.
fn not_overwritten(vm: &Vm) -> Result<()> {
    let pids = apps::pids(vm, "redis")?;
    let checkpoint = |image: &str| -> Result<Output> {
        vm.exec(apps::checkpoint("redis", image, &["--leave-running"]).timeout(PATIENCE))
    };
    checkpoint("/root/first")?.check()?;
    let modes = "cd /root && stat -c '%a %u' first && stat -c '%a %u' first/* | sort -u";
    let modes = vm.sh(modes)?.check()?.text();
    ensure!(modes == "700 0\n600 0\n", "{modes}");
    let script = "cd /root && mkdir empty victim && ln -s victim link && ln -s nowhere dangling";
    vm.sh(script)?.check()?;
    let sums = || -> Result<String> {
        let all = "cd /root && sha256sum first/* && ls -lR empty victim && readlink link dangling";
        Ok(vm.sh(all)?.check()?.text())
    };
    let before = sums()?;
    for taken in ["first", "empty", "link", "dangling"] {
        let output = checkpoint(&format!("/root/{taken}"))?;
        let said = output.error_text();
        ensure!(
            output.code() == Some(USAGE),
            "{taken}: {}, {said}",
            output.status
        );
        ensure!(said.contains("exists already"), "{taken}: {said}");
    }
    ensure!(sums()? == before, "Something was written to");
    ensure!(apps::pids(vm, "redis")? == pids, "Redis has other PIDs");
    apps::check_redis_data(vm, DATA)
}
