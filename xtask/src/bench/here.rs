//! How long programs with few and with many objects stand still, under this machine's own kernel.
//!
//! An emulator hides what real processors are good at, and a virtual machine is all that CRIU can
//! be compared in. Whether the frozen window grows with what is idle needs no peer: two programs
//! of one kind have checkpoints in turns, and run on. What the kernel's freezer takes for the one
//! with many, with nobody looking at it, no checkpoint can do without.

use std::fs;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use vmtests::payload::{self, Profile};

use super::tools::{Said, said};
use super::{Arguments, median};
use crate::{shell, workspace};

/// Kinds as `objects` knows them, how many are few and many, and how many objects each is: an item
/// of an epoll instance has something that it watches, a connection two ends.
const ROWS: &[(&str, [u32; 2], u32)] = &[
    ("eventfds", [10, 10_000], 1),
    ("epoll", [10, 10_000], 2),
    ("listeners", [10, 10_000], 1),
    ("connections", [10, 500], 2),
    ("mappings", [100, 5_000], 1),
    ("threads", [1, 500], 1),
    ("processes", [1, 50], 1),
];

/// The goal: so many times as long, and so many milliseconds for each object more.
const GOAL: (f64, f64) = (1.5, 0.001);

/// Time for a program to start.
const PATIENCE: Duration = Duration::from_secs(60);

/// Starts a program without any descriptor of ours: one that others share could not be carried.
const START: &str = r#"
    for fd in /proc/self/fd/*; do
        fd=${fd##*/}
        if [ "$fd" -gt 2 ]; then eval "exec $fd>&-"; fi
    done
    exec "$@""#;

/// Runs it and prints what came of it.
pub fn run(arguments: &Arguments, wanted: &str) -> Result<()> {
    payload::build(&workspace(), Profile::Release)?;
    let rows = ROWS.iter().filter(|(kind, ..)| kind.contains(wanted));
    let release = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    println!("Linux {}; milliseconds, medians", release.trim());
    println!(
        "{:<14}{:>8}{:>10}{:>8}{:>10}{:>10}{:>8}{:>10}{:>8}",
        "", "few", "frozen", "many", "frozen", "freezer", "ratio", "us each", "goal"
    );
    for (kind, [few, many], objects) in rows {
        let programs = [Program::start(kind, *few)?, Program::start(kind, *many)?];
        let (mut times, mut alone) = ([Vec::new(), Vec::new()], Vec::new());
        for _ in 0..arguments.rounds {
            for (program, times) in programs.iter().zip(&mut times) {
                times.push(program.checkpoint()?.frozen);
            }
            alone.push(programs[1].freeze()?);
        }
        let [short, long] = times.map(median);
        let each = (long - short) * 1000.0 / f64::from((many - few) * objects);
        let goal = GOAL.0 * short + GOAL.1 * f64::from(many * objects);
        println!(
            "{kind:<14}{few:>8}{short:>10.2}{many:>8}{long:>10.2}{:>10.2}{:>8.1}{each:>10.2}{goal:>8.1}",
            median(alone),
            long / short
        );
    }
    Ok(())
}

/// A program that holds objects, as an application of its own.
struct Program {
    name: String,
    dir: PathBuf,
    run: Child,
}

fn tracker() -> PathBuf {
    Profile::Release.directory(&workspace()).join("tracker")
}

fn objects() -> PathBuf {
    Profile::Release.directory(&workspace()).join("objects")
}

impl Program {
    fn start(kind: &str, count: u32) -> Result<Program> {
        let name = format!("bench-{kind}-{count}");
        let dir = workspace().join("target/tmp").join(&name);
        if dir.exists() {
            fs::remove_dir_all(&dir).with_context(|| format!("Remove {}", dir.display()))?;
        }
        fs::create_dir_all(&dir).with_context(|| format!("Create {}", dir.display()))?;
        let run = Command::new("bash")
            .args(["-c", START, "bash"])
            .arg(tracker())
            .args(["run", "--name", &name, "--"])
            .arg(objects())
            .args([kind, &count.to_string()])
            .arg(&dir)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(fs::File::create(dir.join("log"))?)
            .spawn()
            .context("Run bash")?;
        let program = Program { name, dir, run };
        program.await_ready()?;
        Ok(program)
    }

    fn await_ready(&self) -> Result<()> {
        let (ready, begun) = (self.dir.join("ready"), Instant::now());
        while !ready.exists() {
            if begun.elapsed() > PATIENCE {
                let said = fs::read_to_string(self.dir.join("log")).unwrap_or_default();
                bail!("{} is not ready: {said}", self.name);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    fn checkpoint(&self) -> Result<Said> {
        let image = self.dir.join("image");
        let output = Command::new(tracker())
            .args([
                "checkpoint",
                "--name",
                &self.name,
                "--leave-running",
                "--json",
            ])
            .arg("--image")
            .arg(&image)
            .output()
            .context("Run tracker")?;
        ensure!(
            output.status.success(),
            "{}: {}",
            self.name,
            String::from_utf8_lossy(&output.stderr)
        );
        fs::remove_dir_all(&image).with_context(|| format!("Remove {}", image.display()))?;
        said(&output.stdout)
    }

    /// Has the kernel freeze and thaw it, and says how many milliseconds that took.
    fn freeze(&self) -> Result<f64> {
        let pid = fs::read_to_string(self.dir.join("ready"))?;
        let groups = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
        let own = groups.lines().find_map(|line| line.strip_prefix("0::/"));
        let group = cgroup2()?.join(own.context("In no cgroup of the unified hierarchy")?);
        let (freeze, events) = (group.join("cgroup.freeze"), group.join("cgroup.events"));
        let begun = Instant::now();
        fs::write(&freeze, "1")?;
        while !fs::read_to_string(&events)?.contains("frozen 1") {
            if begun.elapsed() > PATIENCE {
                fs::write(&freeze, "0")?;
                bail!("{} does not freeze", self.name);
            }
        }
        fs::write(&freeze, "0")?;
        Ok(begun.elapsed().as_secs_f64() * 1000.0)
    }
}

/// Where the unified hierarchy is mounted.
fn cgroup2() -> Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts")?;
    let mut fields = mounts.lines().map(|line| line.split(' '));
    let point = fields.find_map(|mut fields| {
        let (point, kind) = (fields.nth(1)?, fields.next()?);
        (kind == "cgroup2").then(|| PathBuf::from(point))
    });
    point.context("No cgroup2 is mounted")
}

impl Drop for Program {
    fn drop(&mut self) {
        // With its children, for which `tracker run` would wait.
        let command = format!("^{} .*{}$", objects().display(), self.dir.display());
        let _ = shell::output(Command::new("pkill").args(["-KILL", "-f", &command]));
        let _ = self.run.wait();
        // A leftover in target/ harms nobody.
        let _ = fs::remove_dir_all(&self.dir);
    }
}
