//! One case's life in a VM.

use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde_json::Value;

use super::Mode;
use crate::apps;
use crate::control::ControlError;
use crate::guest::case::{Entry, Expect, GO, READY, RESULT};
use crate::image::Kernel;
use crate::payload::TESTS_DIR;
use crate::protocol::Status;
use crate::vm::{Exec, Output, Vm};

/// Where the cases' directories are.
const CASES_DIR: &str = "/var/lib/cases";

/// Time for one step of a case or one tracker command: a hundred cases may start at a time, on a
/// machine that has other things to do.
const STEP: Duration = Duration::from_secs(180);

/// Exit code of `tracker` for "not eligible".
const NOT_ELIGIBLE: i32 = 3;

/// A case in the guest.
#[derive(Debug)]
pub(crate) struct Life {
    name: &'static str,
    dir: String,
    /// What was started: the program, or `tracker run` above it.
    started: i32,
    /// The program's PID when it was ready; empty before.
    pid: String,
}

/// Runs a case alone, under `tracker`, from start to verdict.
pub(crate) fn run(vm: &Vm, kernel: Kernel, entry: &Entry) -> Result<()> {
    let mut life = Life::start(vm, Mode::Same, entry)?;
    let result = life
        .await_ready(vm)
        .and_then(|()| match entry.expect.refusal(kernel) {
            None => life.end_and_restore(vm, &life.path("image")),
            Some(text) => life.refusal(vm, text).and_then(|said| match entry.expect {
                // Of a running program nobody knows what it will have accepted by then.
                Expect::CarriedByNewer(_) | Expect::RefusedFrozen(_) => Ok(()),
                _ => life.check_agrees(vm, &said),
            }),
        })
        .and_then(|()| life.go(vm))
        .and_then(|()| life.verdict(vm));
    life.finish(vm, result)
}

impl Life {
    /// Starts the program.
    pub(crate) fn start(vm: &Vm, mode: Mode, entry: &Entry) -> Result<Life> {
        let (name, dir) = (entry.name, format!("{CASES_DIR}/{mode}/{}", entry.name));
        let program = format!("{TESTS_DIR}/cases");
        let case = [program.as_str(), name, &dir];
        let argv = match mode {
            Mode::Plain => case.to_vec(),
            _ => [&["tracker", "run", "--name", name, "--"], &case[..]].concat(),
        };
        let started = vm.spawn(Exec::new(argv), Some(&format!("{dir}/run.log")))?;
        Ok(Life {
            name,
            dir,
            started,
            pid: String::new(),
        })
    }

    /// The case's name.
    pub(crate) fn name(&self) -> &'static str {
        self.name
    }

    fn path(&self, name: &str) -> String {
        format!("{}/{name}", self.dir)
    }

    /// Waits until the program is ready.
    pub(crate) fn await_ready(&mut self, vm: &Vm) -> Result<()> {
        let begun = std::time::Instant::now();
        while !vm.await_file(&self.path(READY), Duration::from_secs(2))? {
            if vm.await_file(&self.path(RESULT), Duration::ZERO)? {
                bail!("Not ready: {}", self.result(vm)?);
            }
            // `tracker run` may return once the program runs.
            if let Some(status) = vm.wait(self.started, Duration::ZERO)?
                && status != Status::Exited(0)
            {
                bail!("Not ready: the program ended with {status}");
            }
            ensure!(begun.elapsed() < STEP, "Not ready after {STEP:?}");
        }
        self.pid = String::from_utf8(vm.read_file(&self.path(READY))?)?;
        Ok(())
    }

    fn checkpoint(&self, vm: &Vm, image: &str, more: &[&str]) -> Result<Output> {
        vm.exec(apps::checkpoint(self.name, image, more).timeout(STEP))
    }

    /// Makes an image. Where the agent runs, its model was right about everything that it vouched
    /// for.
    fn image(&self, vm: &Vm, image: &str, more: &[&str]) -> Result<()> {
        let more = [more, &["--json"]].concat();
        let outcome = self.checkpoint(vm, image, &more)?.check()?.text();
        let outcome: Value = serde_json::from_str(&outcome).context(outcome)?;
        let verification = &outcome["verification"];
        ensure!(
            verification.is_null() || verification["differing"] == 0,
            "The model differs from what was found: {verification:#}"
        );
        Ok(())
    }

    /// Makes an image of the program, which runs on.
    pub(crate) fn checkpoint_and_leave(&self, vm: &Vm, image: &str) -> Result<()> {
        self.image(vm, image, &["--leave-running"])?;
        self.is_there(vm)
    }

    /// Makes an image of the program, which ends, and restores it.
    pub(crate) fn end_and_restore(&self, vm: &Vm, image: &str) -> Result<()> {
        self.image(vm, image, &[])?;
        self.is_gone(vm).context("After the checkpoint")?;
        self.restore(vm, image)
    }

    /// Restores the program.
    pub(crate) fn restore(&self, vm: &Vm, image: &str) -> Result<()> {
        vm.exec(Exec::new(["tracker", "restore", "--image", image, "--detach"]).timeout(STEP))?
            .check()?;
        self.is_there(vm)
    }

    /// The program does not run any more.
    pub(crate) fn is_gone(&self, vm: &Vm) -> Result<()> {
        let pid = &self.pid;
        ensure!(
            vm.await_gone(&format!("/proc/{pid}"), Duration::from_secs(5))?,
            "PID {pid} is still there"
        );
        Ok(())
    }

    /// The program runs under its old PID.
    fn is_there(&self, vm: &Vm) -> Result<()> {
        let pid = &self.pid;
        // Another process may have got the PID.
        let command = vm
            .read_file(&format!("/proc/{pid}/cmdline"))
            .unwrap_or_default();
        ensure!(
            String::from_utf8_lossy(&command).contains(&self.dir),
            "PID {pid} is not there, or is another program"
        );
        Ok(())
    }

    fn refusal(&self, vm: &Vm, text: &str) -> Result<String> {
        let output = self.checkpoint(vm, &self.path("image"), &[])?;
        let said = output.error_text();
        ensure!(
            output.code() == Some(NOT_ELIGIBLE),
            "The checkpoint ended with {}, not with exit code {NOT_ELIGIBLE}\n{said}",
            output.status
        );
        ensure!(
            said.contains(text),
            "The refusal does not name {text:?}:\n{said}"
        );
        Ok(said)
    }

    /// `tracker check` lists the objects that the checkpoint has refused.
    fn check_agrees(&self, vm: &Vm, said: &str) -> Result<()> {
        let output = vm.exec(Exec::new(["tracker", "check", self.name]).timeout(STEP))?;
        ensure!(
            output.code() == Some(NOT_ELIGIBLE),
            "tracker check ended with {}, not with exit code {NOT_ELIGIBLE}\n{}",
            output.status,
            output.error_text()
        );
        let listed = output.text();
        let reasons: Vec<&str> = said.lines().filter(|l| l.starts_with("  PID ")).collect();
        ensure!(!reasons.is_empty(), "The refusal names no object:\n{said}");
        for reason in reasons {
            ensure!(
                listed.contains(reason),
                "tracker check does not list {reason:?}:\n{listed}"
            );
        }
        Ok(())
    }

    /// Tells the case to go on.
    pub(crate) fn go(&self, vm: &Vm) -> Result<()> {
        vm.write_file(&self.path(GO), b"")
    }

    /// Waits for the case's verdict.
    pub(crate) fn verdict(&self, vm: &Vm) -> Result<()> {
        let result = self.path(RESULT);
        ensure!(vm.await_file(&result, STEP)?, "No verdict within {STEP:?}");
        match self.result(vm)?.as_str() {
            "PASS" => Ok(()),
            other => Err(anyhow!(other.to_owned())),
        }
    }

    fn result(&self, vm: &Vm) -> Result<String> {
        Ok(String::from_utf8_lossy(&vm.read_file(&self.path(RESULT))?).into_owned())
    }

    /// Lets the program go on under the next kernel, if it is there.
    pub(crate) fn go_after_kexec(&self, vm: &Vm) -> Result<()> {
        self.is_there(vm).and_then(|()| self.go(vm))
    }

    /// After a failure, ends what is left of the case and adds its logs.
    pub(crate) fn finish(&self, vm: &Vm, result: Result<()>) -> Result<()> {
        let result = match result {
            Err(error) if error.is::<ControlError>() || !vm.alive() => return Err(error),
            Err(error) => Err(anyhow!("{error:#}\n{}", self.logs(vm)?)),
            Ok(()) => return Ok(()),
        };
        // The patterns do not match the shell they are written in.
        let kill = r#"
            find /sys/fs/cgroup -mindepth 1 -type d -name "$1" |
                while read -r group; do echo 1 >"$group/cgroup.kill"; done
            pkill -KILL -f "tests/case[s] $1 "
            pkill -KILL -f "ru[n] --name $1 "
            true"#;
        let killed = vm.exec(Exec::new(["sh", "-c", kill, "sh", self.name]));
        // The case's own error matters more than one of the cleaning up.
        killed.and(result)
    }

    fn logs(&self, vm: &Vm) -> Result<String> {
        let script = r#"
            cd "$1" || exit
            for file in log run.log; do
                if [ -s $file ]; then echo "-- $file"; tail -n 20 $file; fi
            done
            # Of a program in the root cgroup the others are not told from the machine's.
            pid=$(cat ready 2>/dev/null)
            group=$(sed -n 's/^0:://p' /proc/$pid/cgroup 2>/dev/null)
            if [ "${group:-/}" != / ]; then
                pid=$(find "/sys/fs/cgroup$group" -name cgroup.procs -exec cat {} + | head -n 8)
            fi
            for pid in $pid; do
                echo "-- process $pid"
                grep -E "^(State|TracerPid|SigPnd|ShdPnd|SigBlk)" /proc/$pid/status
                cat /proc/$pid/cgroup /proc/$pid/syscall /proc/$pid/stack
            done
            echo "-- dmesg"
            dmesg | tail -n 8"#;
        Ok(vm
            .exec(Exec::new(["sh", "-c", script, "sh", &self.dir]))?
            .text())
    }
}
