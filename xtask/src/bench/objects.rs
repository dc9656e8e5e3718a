//! What checkpoints and restores cost by the number of objects: programs that hold many of one
//! kind and do nothing but look at the clock.
//!
//! Each turn starts such a program, makes an image that leaves it running, asks the program how
//! long it stood still, kills it, restores it from the image and asks again, as a sign of life.
//!
//! What the program needed to make its objects is told beside: a restore that makes them as it did,
//! one after the other, cannot take less, and has to read what they were and to start processes.

use std::fmt::Write as _;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde::Serialize;
use vmtests::payload::{Profile, TESTS_DIR};
use vmtests::vm::{Exec, Vm};

use super::tools::{IMAGES, PATIENCE, Tool, milliseconds};
use super::{Arguments, median};
use crate::workspace;

/// Kinds as `objects` knows them, and how many.
const ROWS: &[(&str, &[usize])] = &[
    ("eventfds", &[10, 1_000, 10_000]),
    ("epoll", &[10, 1_000, 10_000]),
    ("listeners", &[10, 1_000, 10_000]),
    ("connections", &[10, 100, 500]),
    ("mappings", &[100, 5_000]),
    ("threads", &[1, 100, 500]),
    ("processes", &[1, 50]),
    ("megabytes", &[16, 200, 1_000]),
    // The same of memory that children would share.
    ("shared", &[200]),
];

/// Room for the largest application and for its image in the page cache: what reclaiming memory
/// costs is not what is measured.
const MEMORY_MIB: u32 = 6144;

/// The application's name.
const NAME: &str = "objects";

/// Where the program and this talk.
const DIR: &str = "/root/objects";

/// Ends it, whoever has restored it, and waits until it is gone, with the connections that it had
/// to itself: `tracker run` would wait for what is left of it.
const KILL: &str = "
    pkill -KILL -f tests/object[s]
    for try in $(seq 200); do
        events=$(cat /sys/fs/cgroup/tracker/objects/cgroup.events 2>/dev/null)
        case $events in
            *'populated 1'*) sleep 0.05 ;;
            *) pgrep -f tests/object[s] >/dev/null || gone=yes ;;
        esac
        [ -z \"$gone\" ] || break
    done
    [ -n \"$gone\" ] || exit 1
    # A lock that a crash has left behind keeps some for ever.
    for try in $(seq 100); do
        awk '$2 ~ /^0100007F/ && $4 != \"0A\" { left = 1 } END { exit left }' /proc/net/tcp &&
            break
        sleep 0.05
    done
    exit 0";

/// One turn, in milliseconds.
#[derive(Debug, Serialize)]
struct Sample {
    row: String,
    tool: Tool,
    /// Frozen time as the tool reports it.
    reported: f64,
    /// Longest gap of the program itself.
    gap: f64,
    /// All of the checkpoint, with what comes before the freeze.
    checkpoint: f64,
    /// The restore.
    restore: f64,
    /// What the program needed to make its objects.
    made: f64,
    /// What tracker says each of its steps took.
    steps: Vec<(String, f64)>,
}

/// Runs it and prints what came of it.
pub fn run(arguments: &Arguments, wanted: &str) -> Result<()> {
    let builder = Vm::builder(workspace())
        .kernel(arguments.kernel)
        .profile(Profile::Release)
        .memory_mib(MEMORY_MIB)
        .quiet(arguments.json);
    let vm = builder.start()?;
    // Closed connections must not be in the way of the same ones restored.
    vm.sh("sysctl -qw net.ipv4.tcp_max_tw_buckets=0")?.check()?;
    arguments.start_agent(&vm)?;
    let rows = ROWS.iter().flat_map(|(kind, counts)| {
        let row = |count: &usize| (*kind, *count, format!("{count} {kind}"));
        counts.iter().map(row).collect::<Vec<_>>()
    });
    let rows: Vec<_> = rows.filter(|(_, _, row)| row.contains(wanted)).collect();
    ensure!(!rows.is_empty(), "No row contains {wanted:?}");
    let (mut samples, mut failures) = (Vec::new(), Vec::new());
    for (kind, count, row) in &rows {
        for round in 1..=arguments.rounds {
            for tool in Tool::ALL.into_iter().filter(|tool| arguments.wants(*tool)) {
                let sample = match turn(&vm, tool, kind, *count, row) {
                    Ok(sample) => sample,
                    // The others take their time, and count all the same.
                    Err(error) if vm.alive() => {
                        failures.push(format!("{row}: {tool:?}: {error:#}"));
                        vm.sh(KILL)?;
                        continue;
                    }
                    Err(error) => return Err(error.context(format!("{row}: {tool:?}"))),
                };
                if !arguments.json {
                    eprintln!(
                        "{row}, round {round}, {tool:?}: reported {:.1}, gap {:.1}, \
                         checkpoint {:.0}, restore {:.0}, made {:.1}",
                        sample.reported, sample.gap, sample.checkpoint, sample.restore, sample.made
                    );
                }
                samples.push(sample);
            }
        }
    }
    if arguments.json {
        println!("{}", serde_json::to_string_pretty(&samples)?);
    } else {
        let rows: Vec<_> = rows.iter().map(|(_, _, row)| row.as_str()).collect();
        println!("Linux {}; milliseconds, medians", vm.hello().release);
        print!("{}", table(&rows, &samples)?);
    }
    ensure!(failures.is_empty(), "{}", failures.join("\n"));
    Ok(())
}

fn turn(vm: &Vm, tool: Tool, kind: &str, count: usize, row: &str) -> Result<Sample> {
    vm.sh(&format!("rm -rf {DIR} {IMAGES}; mkdir -p {DIR} {IMAGES}"))?
        .check()?;
    let (program, count) = (format!("{TESTS_DIR}/objects"), count.to_string());
    let run = [
        "tracker", "run", "--name", NAME, "--", &program, kind, &count, DIR,
    ];
    let started = vm.spawn(Exec::new(run), Some("/root/objects.log"))?;
    let said = || {
        let log = vm.read_file("/root/objects.log").unwrap_or_default();
        String::from_utf8_lossy(&log).into_owned()
    };
    ensure!(
        vm.await_file(&format!("{DIR}/ready"), PATIENCE)?,
        "The program is not ready: {}",
        said()
    );
    let pid = String::from_utf8(vm.read_file(&format!("{DIR}/ready"))?)?;
    let made = told(vm, "made")?;
    // What starting it took does not count.
    take_gap(vm)?;
    let begun = Instant::now();
    let checkpoint = tool.checkpoint(vm, NAME, &pid)?;
    let took = milliseconds(begun.elapsed());
    let gap = take_gap(vm)?;
    vm.sh(KILL)?.check().context("Kill the program")?;
    vm.wait(started, PATIENCE)?;
    let restore = tool.restore(vm)?;
    take_gap(vm).context("After the restore")?;
    vm.sh(KILL)?.check().context("Kill what was restored")?;
    Ok(Sample {
        row: row.to_owned(),
        tool,
        reported: checkpoint.frozen,
        gap,
        checkpoint: took,
        restore,
        made,
        steps: checkpoint.steps,
    })
}

/// The longest time for which the program stood still since it was asked last.
fn take_gap(vm: &Vm) -> Result<f64> {
    vm.sh(&format!("rm -f {DIR}/gap"))?.check()?;
    vm.write_file(&format!("{DIR}/take"), b"")?;
    let there = vm.await_file(&format!("{DIR}/gap"), PATIENCE)?;
    ensure!(there, "The program does not answer");
    told(vm, "gap")
}

/// Milliseconds that the program has written as microseconds.
fn told(vm: &Vm, name: &str) -> Result<f64> {
    let text = String::from_utf8(vm.read_file(&format!("{DIR}/{name}"))?)?;
    let microseconds = text.parse().with_context(|| format!("{name}: {text:?}"))?;
    Ok(milliseconds(Duration::from_micros(microseconds)))
}

fn table(rows: &[&str], samples: &[Sample]) -> Result<String> {
    type Figure = fn(&Sample) -> f64;
    const COLUMNS: [(&str, Figure); 4] = [
        ("frozen", |sample| sample.reported),
        ("gap", |sample| sample.gap),
        ("checkpoint", |sample| sample.checkpoint),
        ("restore", |sample| sample.restore),
    ];
    let mut text = format!("{:<18}", "");
    for (name, _) in COLUMNS {
        write!(text, "{name:>11} {:>9} {:>6}", "CRIU", "ratio")?;
    }
    writeln!(text, "{:>9} {:>6}", "made", "most")?;
    for row in rows {
        write!(text, "{row:<18}")?;
        let of = |tools: &[Tool], value: Figure| {
            let turns = samples
                .iter()
                .filter(|s| s.row == *row && tools.contains(&s.tool));
            median(turns.map(value).collect())
        };
        for (_, value) in COLUMNS {
            let (ours, theirs) = (of(&[Tool::Tracker], value), of(&[Tool::Criu], value));
            write!(text, "{ours:>11.1} {theirs:>9.1} {:>6.1}", theirs / ours)?;
        }
        // The ratio of a restore that did nothing else.
        let (made, theirs) = (of(&Tool::ALL, |s| s.made), of(&[Tool::Criu], |s| s.restore));
        writeln!(text, "{made:>9.1} {:>6.1}", theirs / made)?;
    }
    Ok(text)
}
