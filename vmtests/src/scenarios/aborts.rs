//! Checkpoints that are killed, interrupted or late at every step: nothing of them stays with the
//! application, which goes on.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::faults::{BOTH, CHECKPOINT, ROLLED_BACK};
use super::services::{PATIENCE, all_well, start};
use super::{Kernels, Scenario};
use crate::apps;
use crate::image::Kernel;
use crate::load::Load;
use crate::payload::TESTS_DIR;
use crate::protocol::Status;
use crate::vm::{Exec, Output, Vm};

/// The scenarios of this file. But for one the agent lends iterators, which take seconds to load,
/// to each of many checkpoints.
pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "aborts_killed",
        kernels: Kernels::Either,
        configure: |vm| apps::forwarded(vm).agent(),
        run: killed,
    },
    Scenario {
        name: "aborts_interrupted",
        kernels: Kernels::Only(Kernel::V6_12),
        configure: |vm| apps::forwarded(vm).agent(),
        run: interrupted,
    },
    Scenario {
        name: "aborts_late",
        kernels: Kernels::Only(Kernel::V6_1),
        configure: |vm| apps::forwarded(vm).agent().scratch("64M"),
        run: late,
    },
    Scenario {
        name: "aborts_tree",
        kernels: Kernels::Only(Kernel::V6_12),
        configure: |vm| vm,
        run: tree,
    },
];

/// How long a killed tracker's guard may take.
const CLEANED_UP: Duration = Duration::from_secs(20);

/// How long redis may be silent to its neighbour on a loaded machine.
const GAP: Duration = Duration::from_secs(30);

/// Says what a checkpoint has left of itself: the first argument is the cgroup, below the mount.
const TRACES: &str = r#"
    group=/sys/fs/cgroup/$1
    [ "$(cat $group/cgroup.freeze)" = 0 ] || echo "it is to be frozen"
    grep -qx "frozen 0" $group/cgroup.events || echo "it is frozen"
    for tid in $(find $group -name cgroup.threads -exec cat {} +); do
        # It may have ended meanwhile.
        status=$(cat /proc/$tid/status 2>/dev/null) || continue
        echo "$status" | grep -qx "TracerPid:	0" || echo "thread $tid is traced"
        echo "$status" | grep "^State:	[Tt]"
    done
    ls /sys/fs/bpf/tracker 2>/dev/null
    bpftool cgroup show /sys/fs/cgroup | grep cgroup_inet
    pgrep -x tracker -a | grep checkpoint
    true"#;

fn traces(vm: &Vm, cgroup: &str) -> Result<String> {
    Ok(vm
        .exec(Exec::new(["sh", "-c", TRACES, "sh", cgroup]))?
        .check()?
        .text())
}

/// Where processes are.
fn cgroup_of(vm: &Vm, pids: &[u32]) -> Result<String> {
    let of = |pid: &u32| vm.read_file(&format!("/proc/{pid}/cgroup"));
    let all = pids.iter().map(of).collect::<Result<Vec<_>>>()?;
    Ok(String::from_utf8(all.concat())?)
}

/// Waits until nothing of a checkpoint is left.
fn no_traces(vm: &Vm, cgroup: &str) -> Result<()> {
    let begun = Instant::now();
    loop {
        let traces = traces(vm, cgroup)?;
        if traces.is_empty() {
            return Ok(());
        }
        ensure!(begun.elapsed() < CLEANED_UP, "This is left:\n{traces}");
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// Redis and memcached with clients on the host, and one in the guest that counts its waiting.
struct Lab<'a> {
    vm: &'a Vm,
    load: Load,
    heartbeat: i32,
    pids: Vec<u32>,
    cgroup: String,
    failures: Vec<String>,
}

const HEARTBEAT: &str = "/root/heartbeat";

impl<'a> Lab<'a> {
    fn start(vm: &'a Vm) -> Result<Self> {
        let load = start(vm)?;
        vm.sh(&format!("mkdir -p {HEARTBEAT}"))?.check()?;
        let program = format!("{TESTS_DIR}/heartbeat");
        let command = Exec::new([program, apps::REDIS.to_string(), HEARTBEAT.to_owned()]);
        let heartbeat = vm.spawn(command, Some("/root/heartbeat.log"))?;
        let beating = vm.await_file(&format!("{HEARTBEAT}/beating"), PATIENCE)?;
        ensure!(beating, "There is no heartbeat");
        let pids = apps::pids(vm, "redis")?;
        let cgroup = cgroup_of(vm, &pids)?;
        no_traces(vm, "tracker/redis").context("Before")?;
        Ok(Self {
            vm,
            load,
            heartbeat,
            pids,
            cgroup,
            failures: Vec::new(),
        })
    }

    /// One checkpoint that comes to nothing.
    fn attempt(
        &mut self,
        fault: &str,
        more: &[&str],
        outcome: impl FnOnce(&Output) -> bool,
    ) -> Result<()> {
        let vm = self.vm;
        let image = format!("/root/image.{fault}");
        let attempt = || -> Result<()> {
            let command = apps::checkpoint("redis", &image, more).env("TRACKER_FAULT", fault);
            let output = vm.exec(command.timeout(PATIENCE))?;
            let said = output.error_text();
            ensure!(outcome(&output), "{}\n{said}", output.status);
            if output.code().is_some() {
                let left = vm.sh(&format!("ls -d {image}"))?;
                ensure!(!left.success(), "An image is left");
            }
            no_traces(vm, "tracker/redis")?;
            ensure!(
                apps::pids(vm, "redis")? == self.pids,
                "Redis has other PIDs"
            );
            let cgroup = cgroup_of(vm, &self.pids)?;
            ensure!(cgroup == self.cgroup, "Redis is in {cgroup}");
            // What was dropped is sent again by the emulator, whose idea of a round trip grows
            // with each of these stops.
            self.load.progress(5, PATIENCE)?;
            let lost = self.load.lost();
            ensure!(lost.is_empty(), "Connections are lost: {lost:?}");
            Ok(())
        };
        if let Err(error) = attempt().with_context(|| format!("Fault {fault}")) {
            // A VM that is gone has nothing more to tell.
            if !vm.alive() {
                return Err(error);
            }
            self.failures.push(format!("{error:#}"));
        }
        Ok(())
    }

    /// The heart has never stopped, and the next checkpoint is as good as any.
    fn finish(self) -> Result<()> {
        let vm = self.vm;
        ensure!(self.failures.is_empty(), "{}", self.failures.join("\n"));
        vm.write_file(&format!("{HEARTBEAT}/stop"), b"")?;
        let ended = vm.wait(self.heartbeat, PATIENCE)?;
        let log = vm.read_file("/root/heartbeat.log").unwrap_or_default();
        let log = String::from_utf8_lossy(&log).into_owned();
        ensure!(
            ended == Some(Status::Exited(0)),
            "The heartbeat: {ended:?} {log}"
        );
        let gap = String::from_utf8(vm.read_file(&format!("{HEARTBEAT}/gap"))?)?;
        let gap = Duration::from_micros(gap.parse()?);
        ensure!(gap < GAP, "The heart has stopped for {gap:?}");
        let image = "/root/image";
        vm.exec(apps::checkpoint("redis", image, &[]).timeout(PATIENCE))?
            .check()?;
        // Its cgroup had all its processes killed, for which some kernels kill who is born there.
        let restore = Exec::new(["tracker", "restore", "--image", image, "--detach"])
            .env("TRACKER_FAULT", "restore-birth:kill");
        vm.exec(restore.timeout(PATIENCE))?.check()?;
        no_traces(vm, "tracker/redis").context("After a restore")?;
        all_well(vm, self.load)
    }
}

/// SIGKILL, which no error path can clean up after.
fn killed(vm: &Vm) -> Result<()> {
    let mut lab = Lab::start(vm)?;
    // What the guard undoes, it undoes below as well.
    let script = "
        cd /sys/fs/cgroup/tracker/redis && mkdir inner &&
        for pid in $(cat cgroup.procs); do echo $pid >inner/cgroup.procs || exit; done";
    vm.sh(script)?.check()?;
    lab.cgroup = cgroup_of(vm, &lab.pids)?;
    ensure!(lab.cgroup.contains("inner"), "Redis is in {}", lab.cgroup);
    // Traces are seen where there are some.
    let command = apps::checkpoint("redis", "/root/image.hang", &[]);
    let hanging = vm.spawn(command.env("TRACKER_FAULT", "files:hang"), None)?;
    let begun = Instant::now();
    loop {
        let traces = traces(vm, "tracker/redis")?;
        // Traced is only a thread whose call has to be issued again.
        if ["frozen", "cgroup_inet", "checkpoint"]
            .iter()
            .all(|t| traces.contains(t))
        {
            break;
        }
        ensure!(
            begun.elapsed() < PATIENCE,
            "A checkpoint leaves only these traces:\n{traces}"
        );
        std::thread::sleep(Duration::from_millis(200));
    }
    vm.kill(hanging, libc::SIGKILL)?;
    no_traces(vm, "tracker/redis").context("Killed from outside")?;

    for place in [BOTH, CHECKPOINT].concat() {
        let died = |output: &Output| output.status == Status::Signaled(libc::SIGKILL);
        lab.attempt(&format!("{place}:kill"), &[], died)?;
    }
    lab.finish()
}

/// SIGTERM and SIGINT in turns: one place takes both alike.
fn interrupted(vm: &Vm) -> Result<()> {
    let mut lab = Lab::start(vm)?;
    let signals = ["term", "int"].into_iter().cycle();
    for (place, signal) in [BOTH, CHECKPOINT].concat().into_iter().zip(signals) {
        let rolled_back = |output: &Output| {
            output.code() == Some(ROLLED_BACK) && output.error_text().contains("Interrupted")
        };
        lab.attempt(&format!("{place}:{signal}"), &[], rolled_back)?;
    }
    lab.finish()
}

/// `--max-freeze`, and `--deadline` where what is late is the freezing itself.
fn late(vm: &Vm) -> Result<()> {
    let mut lab = Lab::start(vm)?;
    let frozen = |place: &&&str| !["prepare", "precopy", "lock"].contains(*place);
    let places = [BOTH, CHECKPOINT].concat();
    for place in places.iter().filter(frozen) {
        let rolled_back = |output: &Output| {
            output.code() == Some(ROLLED_BACK) && output.error_text().contains("--max-freeze")
        };
        // What the fault point takes is more.
        let limit = ["--max-freeze", "1000"];
        lab.attempt(&format!("{place}:slow"), &limit, rolled_back)?;
    }
    let no_time = |output: &Output| {
        output.code() == Some(ROLLED_BACK)
            && output.error_text().contains("(sh) did not stop within")
    };
    let waiting = waits_for_its_disk(vm)?;
    let alone = std::mem::replace(&mut lab.pids, apps::pids(vm, "redis")?);
    lab.cgroup = cgroup_of(vm, &lab.pids)?;
    lab.attempt("none", &["--deadline", "500"], no_time)?;
    vm.sh("fsfreeze --unfreeze /mnt")?.check()?;
    let ended = vm.wait(waiting, PATIENCE)?;
    ensure!(
        ended == Some(Status::Exited(0)),
        "What waited for its disk: {ended:?}"
    );
    lab.cgroup = cgroup_of(vm, &alone)?;
    lab.pids = alone;
    lab.finish()
}

/// A process beside redis that no freezer can stop: it waits for its filesystem, which is frozen
/// itself.
fn waits_for_its_disk(vm: &Vm) -> Result<i32> {
    vm.sh("mount /dev/vdc /mnt && fsfreeze --freeze /mnt")?
        .check()?;
    let script = "
        echo $$ >/sys/fs/cgroup/tracker/redis/cgroup.procs &&
        exec </dev/null >/dev/null 2>&1 && echo >/mnt/file";
    let pid = vm.spawn(Exec::new(["sh", "-c", script]), None)?;
    let begun = Instant::now();
    loop {
        let stat = String::from_utf8(vm.read_file(&format!("/proc/{pid}/stat"))?)?;
        if stat.contains("(sh) D") {
            return Ok(pid);
        }
        ensure!(begun.elapsed() < PATIENCE, "It does not wait: {stat}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Processes of several cgroups cannot all be moved back, and are not moved.
fn scattered(vm: &Vm) -> Result<()> {
    let script = "
        mkdir /sys/fs/cgroup/aside || exit
        sleep 1000 & child=$!
        echo $child >/sys/fs/cgroup/aside/cgroup.procs && echo $child >/root/child
        wait";
    let pid = vm.spawn(Exec::new(["sh", "-c", script]), None)?;
    ensure!(vm.await_file("/root/child", PATIENCE)?, "There is no child");
    let child = String::from_utf8(vm.read_file("/root/child")?)?;
    let (pid, child) = (pid.to_string(), child.trim());
    let groups = || -> Result<[Vec<u8>; 2]> {
        let of = |pid: &str| vm.read_file(&format!("/proc/{pid}/cgroup"));
        Ok([of(&pid)?, of(child)?])
    };
    let before = groups()?;
    ensure!(before[1].trim_ascii() == b"0::/aside", "{before:?}");
    let command = [
        "tracker",
        "checkpoint",
        "--pid",
        &pid,
        "--image",
        "/root/image",
    ];
    let output = vm.exec(Exec::new(command).timeout(PATIENCE))?;
    let said = output.error_text();
    ensure!(output.code() == Some(3), "{}: {said}", output.status);
    ensure!(
        said.contains(&format!("PID {child} is in the cgroup /aside")),
        "{said}"
    );
    ensure!(groups()? == before, "They were moved");
    Ok(())
}

/// A tree of processes that is moved for the checkpoint is moved back.
fn tree(vm: &Vm) -> Result<()> {
    let script = "
        mkdir /sys/fs/cgroup/elsewhere && echo 0 >/sys/fs/cgroup/elsewhere/cgroup.procs &&
        while :; do echo beat >>/root/beats; sleep 0.05; done";
    let pid = vm.spawn(Exec::new(["sh", "-c", script]), None)?;
    let pid = pid.to_string();
    let beats = || -> Result<u64> {
        let script = "stat -c %s /root/beats 2>/dev/null || echo 0";
        Ok(vm.sh(script)?.check()?.text().trim().parse()?)
    };
    let goes_on = || -> Result<()> {
        let (before, begun) = (beats()?, Instant::now());
        while beats()? < before + 15 {
            ensure!(begun.elapsed() < PATIENCE, "The heart has stopped");
            std::thread::sleep(Duration::from_millis(100));
        }
        Ok(())
    };
    goes_on().context("Before")?;
    scattered(vm).context("A tree in two cgroups")?;
    // In turns: which of the two undoes it, the guard or tracker itself, is tested everywhere else.
    let ends = [
        ("kill", Status::Signaled(libc::SIGKILL)),
        ("term", Status::Exited(ROLLED_BACK)),
    ];
    let places = [BOTH, CHECKPOINT].concat();
    for (place, (action, status)) in places.into_iter().zip(ends.into_iter().cycle()) {
        let fault = format!("{place}:{action}");
        let image = format!("/root/image.{fault}");
        let command = ["tracker", "checkpoint", "--pid", &pid, "--image", &image];
        let command = Exec::new(command).env("TRACKER_FAULT", &fault);
        let output = vm.exec(command.timeout(PATIENCE))?;
        if output.status != status {
            bail!("{fault}: {}\n{}", output.status, output.error_text());
        }
        no_traces(vm, "elsewhere").with_context(|| fault.clone())?;
        let group = vm.read_file(&format!("/proc/{pid}/cgroup"))?;
        ensure!(
            group.trim_ascii() == b"0::/elsewhere",
            "{fault}: it is in {}",
            String::from_utf8_lossy(&group)
        );
        let others = "ls -d /sys/fs/cgroup/tracker/*/ 2>/dev/null | xargs";
        let others = vm.sh(others)?.text();
        ensure!(others.trim().is_empty(), "{fault}: {others} is left");
        goes_on().with_context(|| fault.clone())?;
    }
    Ok(())
}
