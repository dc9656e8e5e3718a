//! Some cases at the same time: each is left running by a checkpoint and passes, is restored
//! from that checkpoint's image, ended by a second one, restored again, and passes again.
//!
//! A case that has passed has changed its files, and an image is one of memory only. So the
//! cases have a filesystem of their own, which is put back as it was at the checkpoint.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::life::Life;
use super::{Mode, Report};
use crate::guest::case::Entry;
use crate::vm::{Exec, Vm, VmBuilder};

/// Time for copying the filesystem.
const COPY: Duration = Duration::from_secs(300);

/// How many cases run at the same time. Waiting together, those that sleep cost the time of one;
/// those that do not make everything slow.
const AT_ONCE: usize = 12;

/// Where the images are.
const IMAGES_DIR: &str = "/var/lib/images";

/// Mounts the cases' filesystem.
const BEGIN: &str = "
    mkdir -p /var/lib/cases /var/lib/images &&
    mount /dev/vdc /var/lib/cases";

/// Keeps the filesystem as it is. Closed connections leave nothing in TIME_WAIT that would be
/// in the way of the same ones restored: a real machine waits a minute instead.
const KEEP: &str = "
    sysctl -qw net.ipv4.tcp_max_tw_buckets=0 &&
    fsfreeze --freeze /var/lib/cases &&
    dd if=/dev/vdc of=/var/lib/images/filesystem bs=1M conv=sparse status=none
    kept=$?
    fsfreeze --unfreeze /var/lib/cases && exit $kept";

/// Puts it back, once nobody uses it.
const PUT_BACK: &str = "
    for try in $(seq 50); do
        if umount /var/lib/cases 2>/dev/null; then break; fi
        sleep 0.2
    done
    ! mountpoint -q /var/lib/cases || { echo 'The filesystem is busy' >&2; exit 1; }
    dd if=/var/lib/images/filesystem of=/dev/vdc bs=1M status=none &&
    mount /dev/vdc /var/lib/cases";

/// The disk that the cases' filesystem is on.
pub(crate) fn disk(vm: VmBuilder) -> VmBuilder {
    vm.scratch("128M")
}

/// A case on its way.
struct Member {
    life: Life,
    names: [String; 2],
    took: Duration,
}

impl Member {
    /// One step of this case; what fails is its verdict, and its end.
    fn step(
        mut self,
        vm: &Vm,
        report: &Report,
        verdict: usize,
        step: impl FnOnce(&Life) -> Result<()>,
    ) -> Option<Member> {
        let begun = Instant::now();
        let result = self.life.finish(vm, step(&self.life));
        self.took += begun.elapsed();
        if result.is_ok() {
            return Some(self);
        }
        for name in &self.names[verdict..] {
            report.verdict(name, &result, self.took);
        }
        None
    }

    fn passed(&mut self, report: &Report, verdict: usize) {
        report.verdict(&self.names[verdict], &Ok(()), self.took);
        self.took = Duration::ZERO;
    }

    fn image(&self, number: u32) -> String {
        format!("{IMAGES_DIR}/{}.{number}", self.life.name())
    }
}

/// Takes both verdicts of every case: that of the one left running and that of the restored.
pub(crate) fn run(
    vm: &Vm,
    entries: &[&'static Entry],
    report: &Report,
    names: &dyn Fn(&Entry) -> [String; 2],
) -> Result<()> {
    vm.sh(BEGIN)?.check().context("The cases' filesystem")?;
    for entries in entries.chunks(AT_ONCE) {
        run_some(vm, entries, report, names)?;
    }
    Ok(())
}

fn run_some(
    vm: &Vm,
    entries: &[&'static Entry],
    report: &Report,
    names: &dyn Fn(&Entry) -> [String; 2],
) -> Result<()> {
    let mut started = Vec::new();
    for entry in entries {
        let life = Life::start(vm, Mode::Again, entry)?;
        started.push(Member {
            life,
            names: names(entry),
            took: Duration::ZERO,
        });
    }
    let mut ready = Vec::new();
    for mut member in started {
        let result = member.life.await_ready(vm);
        ready.extend(member.step(vm, report, 0, |_| result));
    }
    let mut left = Vec::new();
    for member in ready {
        let image = member.image(1);
        left.extend(member.step(vm, report, 0, |life| life.checkpoint_and_leave(vm, &image)));
    }
    let script = |text: &str| {
        vm.exec(Exec::new(["sh", "-c", text]).timeout(COPY))?
            .check()
    };
    script(KEEP).context("Keep the cases' filesystem")?;

    for member in &left {
        member.life.go(vm)?;
    }
    let mut passed = Vec::new();
    for member in left {
        let ended = |life: &Life| life.verdict(vm).and_then(|()| life.is_gone(vm));
        let member = member.step(vm, report, 0, ended);
        passed.extend(member.map(|mut member| {
            member.passed(report, 0);
            member
        }));
    }
    script(PUT_BACK).context("Put the cases' filesystem back")?;

    let mut restored = Vec::new();
    for member in passed {
        let (first, second) = (member.image(1), member.image(2));
        let twice = |life: &Life| {
            life.restore(vm, &first).context("The first restore")?;
            life.end_and_restore(vm, &second).context("The second time")
        };
        restored.extend(member.step(vm, report, 1, twice));
    }
    for member in &restored {
        member.life.go(vm)?;
    }
    for member in restored {
        let member = member.step(vm, report, 1, |life| life.verdict(vm));
        if let Some(mut member) = member {
            member.passed(report, 1);
        }
    }
    Ok(())
}
