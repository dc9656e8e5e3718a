//! What the rings have no room for is counted, shown, and found out by itself.

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::time::Duration;

use super::tracked::{
    PATIENCE, audit, await_status, calm, end, lost, start, start_agent, status, stop, storm,
};
use super::{Kernels, Scenario};
use crate::vm::{Exec, Vm};

/// The scenarios of this file.
pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "tracking_losses_fentry",
        kernels: Kernels::Either,
        configure: |vm| vm,
        run: |vm| losses(vm, "fentry"),
    },
    Scenario {
        name: "tracking_losses_fallback",
        kernels: Kernels::Either,
        configure: |vm| vm,
        run: |vm| losses(vm, "fallback"),
    },
];

const METRICS: &str = "127.0.0.1:9469";

/// Longer than the agent waits between two readings of anything.
const QUIET: Duration = Duration::from_secs(3);

/// Changes what is said each time, with any hooks.
const BURST: [&str; 3] = [
    "python3",
    "-c",
    "import os\nprint('go', flush=True)\nwhile True: os.umask(0o22)",
];

/// Rings of one page are too small for a storm. The audit would read what is suspect first, so
/// it is only asked once the agent is content by itself, and must find nothing left to read.
fn losses(vm: &Vm, hooks: &str) -> Result<()> {
    let options = ["--ring-bytes", "4096", "--metrics-listen", METRICS];
    let agent = start_agent(vm, hooks, &options)?;
    let storm = storm(vm, 3)?;
    // Without fentry a table is marked once until it was read, which is little to lose.
    let (least, burst) = match hooks {
        "fentry" => (100, None),
        _ => (3, Some(start(vm, "burst", &BURST, "go")?)),
    };
    await_status(vm, "events are lost", |now| {
        lost(now).is_ok_and(|lost| lost >= least)
    })?;
    if let Some(burst) = burst {
        end(vm, "burst", burst)?;
    }
    calm(vm, "storm")?;

    let healed = heal(vm)?;
    shown(vm, &healed)?;
    audit(vm, &format!("after {} losses", lost(&healed)?), 50)?;
    let after = status(vm)?;
    ensure!(
        reread(&after, hooks) == reread(&healed, hooks),
        "The audit had to read: {:#} before, {:#} after",
        healed["counters"],
        after["counters"]
    );
    end(vm, "storm", storm)?;
    stop(vm, agent)
}

/// What was read again for having been lost. Without fentry whoever asks makes the agent read,
/// for that some changes of sockets and watches have no hook at all.
fn reread(status: &Value, hooks: &str) -> Value {
    let counters = &status["counters"];
    if hooks == "fentry" {
        return counters["readings"].clone();
    }
    let of = |kind: &str| counters["resyncs"][kind].clone();
    [of("address-spaces"), of("tables"), of("epolls")]
        .into_iter()
        .collect()
}

/// Waits until nothing is suspect and the agent has no more wish to read.
fn heal(vm: &Vm) -> Result<Value> {
    let suspects = |now: &Value| now["suspects"].as_object().is_some_and(|s| !s.is_empty());
    loop {
        let now = await_status(vm, "nothing is suspect", |now| {
            !suspects(now) && now["lag"] == 0
        })?;
        std::thread::sleep(QUIET);
        let later = status(vm)?;
        let readings = |status: &Value| status["counters"]["readings"].clone();
        if readings(&now) == readings(&later) && !suspects(&later) {
            println!("healed: {}", later["counters"]);
            return Ok(later);
        }
    }
}

/// What was lost is told by class to people and to Prometheus, too.
fn shown(vm: &Vm, status: &Value) -> Result<()> {
    let text = vm.exec(Exec::new(["tracker", "status"]))?.check()?.text();
    let line = text.lines().find(|line| line.starts_with("Lost: "));
    let line = line.with_context(|| format!("No losses in\n{text}"))?;
    let request =
        "exec 3<>/dev/tcp/${1/:/\\/} && printf 'GET /metrics HTTP/1.0\\r\\n\\r\\n' >&3 && cat <&3";
    let scrape = Exec::new(["bash", "-c", request, "bash", METRICS]).timeout(PATIENCE);
    let metrics = vm.exec(scrape)?.check()?.text();
    let by_class = status["counters"]["lost"].as_object();
    let by_class = by_class.context("No loss counters")?;
    for (class, count) in by_class {
        if *count != 0 {
            let said = format!("{count} {class}");
            let mut parts = line["Lost: ".len()..].split(", ");
            ensure!(parts.any(|part| part == said), "No {said} in {line:?}");
        }
        let sample = format!("tracker_lost_events_total{{class=\"{class}\"}} {count}");
        let mut samples = metrics.lines().map(str::trim_end);
        ensure!(
            samples.any(|line| line == sample),
            "No {sample} in {metrics}"
        );
    }
    Ok(())
}
