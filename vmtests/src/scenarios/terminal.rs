//! An interactive bash on a pseudo-terminal, with jobs, used by what its user types and sees.

use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};

use super::services::PATIENCE;
use super::{Kernels, Scenario};
use crate::apps;
use crate::vm::{Exec, Vm};

/// The scenarios of this file.
pub const SCENARIOS: &[Scenario] = &[Scenario {
    name: "terminal_bash",
    kernels: Kernels::Either,
    configure: |vm| vm,
    run: bash,
}];

/// Holds the master as a terminal emulator does: what comes through the FIFO is typed, what is
/// shown is appended to a file.
const EMULATOR: &str = r#"
import os
os.mkfifo("/root/keys")
master, slave = os.openpty()
name = os.ttyname(slave)
if os.fork() == 0:
    os.setsid()
    # The first terminal that a session leader opens is its controlling one.
    terminal = os.open(name, os.O_RDWR)
    for number in range(3):
        os.dup2(terminal, number)
    os.closerange(3, 256)
    environment = {"PS1": "ready: ", "TERM": "dumb", "PATH": "/usr/bin:/bin", "HOME": "/root"}
    os.execve("/bin/bash", ["bash", "--norc", "--noprofile", "-i"], environment)
os.close(slave)
keys = os.open("/root/keys", os.O_RDWR)
if os.fork() == 0:
    while True:
        os.write(master, os.read(keys, 4096))
screen = os.open("/root/screen", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
while True:
    try:
        os.write(screen, os.read(master, 4096))
    except OSError:
        break
"#;

/// What nothing else prints.
const PROMPT: &str = "ready: ";

/// The screen as a file that only grows, and where what was seen of it ends.
struct Screen<'a> {
    vm: &'a Vm,
    seen: usize,
}

impl Screen<'_> {
    /// Types this.
    fn type_(&self, keys: &str) -> Result<()> {
        let escaped: String = keys.bytes().map(|byte| format!("\\{byte:03o}")).collect();
        self.vm
            .sh(&format!("printf '{escaped}' >/root/keys"))?
            .check()?;
        Ok(())
    }

    /// Waits until this is shown, after what was seen before; returns all up to there.
    fn shows(&mut self, wanted: &str) -> Result<String> {
        let begun = Instant::now();
        loop {
            let screen = self.vm.read_file("/root/screen").unwrap_or_default();
            let fresh = String::from_utf8_lossy(screen.get(self.seen..).unwrap_or_default());
            if let Some(at) = fresh.find(wanted) {
                let shown = fresh[..at + wanted.len()].to_owned();
                self.seen += shown.len();
                return Ok(shown);
            }
            if begun.elapsed() > PATIENCE {
                bail!("{wanted:?} is not shown, but {fresh:?}");
            }
            std::thread::sleep(Duration::from_millis(200));
        }
    }

    /// Types a command and waits for the prompt after it; what it printed.
    fn command(&mut self, command: &str) -> Result<String> {
        self.type_(&format!("{command}\n"))?;
        self.shows("\n")?;
        self.shows(PROMPT)
    }
}

/// Job control goes on where it was, through the same terminal.
fn bash(vm: &Vm) -> Result<()> {
    vm.write_file("/root/emulator.py", EMULATOR.as_bytes())?;
    let run = [
        "tracker",
        "run",
        "--name",
        "shell",
        "--",
        "python3",
        "/root/emulator.py",
    ];
    vm.spawn(Exec::new(run), Some("/root/shell.log"))?;
    let mut screen = Screen { vm, seen: 0 };
    screen.shows(PROMPT)?;
    screen.command("stty rows 41 columns 117")?;
    screen.command("colour=blue; name=$(tty)")?;
    screen.command("sleep 1001 &")?;
    // A job that is stopped by Ctrl-Z, as the one in the foreground.
    screen.type_("cat >/root/caught\n")?;
    screen.shows("\n")?;
    let reads =
        "for n in $(seq 600); do pgrep -x cat >/dev/null && exit 0; sleep 0.1; done; exit 1";
    vm.sh(reads)?.check()?;
    screen.type_("first line\n")?;
    screen.shows("first line\r\n")?;
    screen.type_("\x1a")?;
    screen.shows("Stopped")?;
    screen.shows(PROMPT)?;
    screen.command("(exit 7)")?;
    screen.type_("echo half a")?;
    screen.shows("echo half a")?;

    let pids = apps::pids(vm, "shell")?;
    let checkpoint = apps::checkpoint("shell", "/root/image.shell", &[]);
    vm.exec(checkpoint.timeout(PATIENCE))?.check()?;
    ensure!(
        apps::pids(vm, "shell").is_err(),
        "It still runs after the checkpoint"
    );
    let restore = [
        "tracker",
        "restore",
        "--image",
        "/root/image.shell",
        "--detach",
    ];
    vm.exec(Exec::new(restore).timeout(PATIENCE))?.check()?;
    let now = apps::pids(vm, "shell")?;
    ensure!(now == pids, "It had PIDs {pids:?}, has {now:?}");

    screen.type_(" line, status $?\n")?;
    screen.shows("half a line, status 7\r\n")?;
    screen.shows(PROMPT)?;
    let shown = screen.command("jobs")?;
    ensure!(
        shown.contains("Running") && shown.contains("sleep 1001 &"),
        "jobs shows {shown:?}"
    );
    ensure!(
        shown.contains("Stopped") && shown.contains("cat >"),
        "jobs shows {shown:?}"
    );
    let shown =
        screen.command("echo colour $colour, $(stty size), $([ $name = $(tty) ]; echo $?)")?;
    ensure!(shown.contains("colour blue, 41 117, 0\r\n"), "{shown:?}");
    // The stopped job comes to the foreground, reads on, and ends with its end of file.
    screen.type_("fg\n")?;
    screen.shows("/root/caught")?;
    screen.type_("second line\n")?;
    screen.shows("second line\r\n")?;
    screen.type_("\x04")?;
    screen.shows(PROMPT)?;
    let caught = vm.read_file("/root/caught")?;
    ensure!(
        caught == b"first line\nsecond line\n",
        "The job wrote {:?}",
        String::from_utf8_lossy(&caught)
    );
    let shown = screen.command("kill %1; wait %1; echo status $?")?;
    ensure!(shown.contains("status 143\r\n"), "{shown:?}");
    // Ctrl-C reaches the job in the foreground and not the shell.
    screen.type_("sleep 1002\n")?;
    screen.shows("sleep 1002\r\n")?;
    let sleeps = "for n in $(seq 600); do pgrep -f 'sleep 1002' >/dev/null && exit 0; sleep 0.1; done; exit 1";
    vm.sh(sleeps)?.check()?;
    screen.type_("\x03")?;
    screen.shows(PROMPT)?;
    let shown = screen.command("echo status $?")?;
    ensure!(shown.contains("status 130\r\n"), "{shown:?}");
    // With its shell the terminal ends, and with that the emulator's output.
    screen.type_("exit\n")?;
    screen.shows("exit")?;
    Ok(())
}
