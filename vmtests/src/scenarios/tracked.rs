//! What the scenarios about live tracking share: the agent and what it tracks.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::payload::TESTS_DIR;
use crate::vm::{Exec, Vm};

/// Time for anything on a loaded machine.
pub const PATIENCE: Duration = Duration::from_secs(300);

/// Between two looks at something that is waited for.
pub const PAUSE: Duration = Duration::from_millis(300);

const AGENT_LOG: &str = "/root/agent.log";

/// The control socket, where no other is asked for.
pub const SOCKET: &str = "/run/tracker/agent.sock";

/// Starts the agent and waits until it, and no other, answers.
///
/// # Errors
/// If it ends instead, or takes too long; with its log.
pub fn start_agent(vm: &Vm, hooks: &str, options: &[&str]) -> Result<i32> {
    let command = ["tracker", "-vv", "agent"].iter().chain(options).copied();
    let agent = Exec::new(command).env("TRACKER_HOOKS", hooks);
    let pid = vm.spawn(agent, Some(AGENT_LOG))?;
    await_agent(vm, pid)?;
    let now = status(vm)?;
    ensure!(now["hooks"] == hooks, "The agent has other hooks: {now:#}");
    Ok(pid)
}

/// Waits until the agent of this PID answers.
///
/// # Errors
/// If it ends instead, or takes too long; with its log.
pub fn await_agent(vm: &Vm, pid: i32) -> Result<()> {
    let begun = Instant::now();
    while !status(vm).is_ok_and(|now| now["agent"]["pid"] == pid) {
        if let Some(how) = vm.wait(pid, PAUSE)? {
            bail!("The agent did not start: {how}\n{}", agent_log(vm));
        }
        ensure!(
            begun.elapsed() < PATIENCE,
            "The agent does not answer\n{}",
            agent_log(vm)
        );
    }
    Ok(())
}

/// Ends a process and waits for its end.
///
/// # Errors
/// If it does not end.
pub fn stop(vm: &Vm, pid: i32) -> Result<()> {
    vm.kill(pid, libc::SIGTERM)?;
    ensure!(
        vm.wait(pid, Duration::from_secs(60))?.is_some(),
        "Process {pid} did not end"
    );
    Ok(())
}

/// What the agent has logged.
pub fn agent_log(vm: &Vm) -> String {
    log(vm, AGENT_LOG)
}

/// A text file of the guest, for messages; empty if there is none.
pub fn log(vm: &Vm, path: &str) -> String {
    let bytes = vm.read_file(path).unwrap_or_default();
    String::from_utf8_lossy(&bytes).into_owned()
}

/// What `tracker status --json` prints.
///
/// # Errors
/// If no agent answers.
pub fn status(vm: &Vm) -> Result<Value> {
    let output = vm
        .exec(Exec::new(["tracker", "status", "--json"]))?
        .check()?;
    Ok(serde_json::from_str(&output.text())?)
}

/// A status for messages: without the long list of programs.
fn brief(mut status: Value) -> Value {
    if let Some(fields) = status.as_object_mut() {
        fields.remove("programs");
    }
    status
}

/// Looks at the status until it is as it should be.
///
/// # Errors
/// If it is not in time; with the last status.
pub fn await_status(vm: &Vm, what: &str, good: impl Fn(&Value) -> bool) -> Result<Value> {
    let begun = Instant::now();
    loop {
        let now = status(vm)?;
        if good(&now) {
            return Ok(now);
        }
        ensure!(
            begun.elapsed() < PATIENCE,
            "{what}: never, but {:#}",
            brief(now)
        );
        std::thread::sleep(PAUSE);
    }
}

/// The audit finds no difference and nothing that changed meanwhile, and enough was compared
/// to mean something.
///
/// # Errors
/// If not; with what differs.
pub fn audit(vm: &Vm, when: &str, descriptors: u64) -> Result<()> {
    audited_at_rest(vm, when, descriptors)?;
    Ok(())
}

/// As [`audit`], with the report.
///
/// # Errors
/// If there are differences; with them.
pub fn audited_at_rest(vm: &Vm, when: &str, descriptors: u64) -> Result<Value> {
    let report = audited(vm, when, descriptors)?;
    ensure!(
        report["unstable"] == serde_json::json!([]),
        "{when}, everything at rest: {report:#}"
    );
    Ok(report)
}

/// As [`audit`], of programs that are at work: what changes all the time is no difference.
///
/// # Errors
/// If there are differences; with them.
pub fn audited(vm: &Vm, when: &str, descriptors: u64) -> Result<Value> {
    let output = vm.exec(Exec::new(["tracker", "audit", "--json"]).timeout(PATIENCE))?;
    let report: Value = serde_json::from_str(&output.text())
        .with_context(|| format!("{when}: {}", output.error_text()))?;
    ensure!(
        output.success(),
        "{when}: {report:#}\n{:#}",
        brief(status(vm)?)
    );
    let compared = report["compared"]["descriptors"].as_u64();
    ensure!(
        compared.is_some_and(|compared| compared >= descriptors),
        "{when}: only {compared:?} descriptors were compared"
    );
    println!("{when}: {}", report["compared"]);
    Ok(report)
}

/// Starts an application and waits until its log shows a line.
///
/// # Errors
/// If it ends, or says no such thing in time.
pub fn start(vm: &Vm, name: &str, command: &[&str], line: &str) -> Result<i32> {
    let run = ["tracker", "run", "--name", name, "--"];
    start_beside(vm, name, &[&run[..], command].concat(), line)
}

/// As [`start`], of a program that is not tracked.
///
/// # Errors
/// If it ends, or says no such thing in time.
pub fn start_beside(vm: &Vm, name: &str, command: &[&str], line: &str) -> Result<i32> {
    let path = app_log(name);
    let pid = vm.spawn(Exec::new(command.iter().copied()), Some(&path))?;
    await_line(vm, name, pid, line)?;
    Ok(pid)
}

/// Waits until a started program's log shows a line.
///
/// # Errors
/// If it ends, or says no such thing in time; with its log.
pub fn await_line(vm: &Vm, name: &str, pid: i32, line: &str) -> Result<()> {
    let begun = Instant::now();
    while !says(vm, name, line) {
        if let Some(how) = vm.wait(pid, PAUSE)? {
            bail!("{name} ended: {how}\n{}", log(vm, &app_log(name)));
        }
        ensure!(
            begun.elapsed() < PATIENCE,
            "{name} does not say {line:?}, but\n{}",
            log(vm, &app_log(name))
        );
    }
    Ok(())
}

/// Whether a started program's log shows a line.
pub fn says(vm: &Vm, name: &str, line: &str) -> bool {
    log(vm, &app_log(name)).contains(line)
}

fn app_log(name: &str) -> String {
    format!("/root/{name}.log")
}

/// Ends an application and sees that the model forgets it.
///
/// # Errors
/// If it does not end, or stays in the model.
pub fn end(vm: &Vm, name: &str, pid: i32) -> Result<()> {
    vm.sh(&format!(
        "echo 1 > /sys/fs/cgroup/tracker/{name}/cgroup.kill"
    ))?
    .check()?;
    vm.wait(pid, Duration::from_secs(60))?;
    await_status(vm, &format!("{name} leaves the model"), |now| {
        application(now, name).is_none()
    })?;
    Ok(())
}

/// An application in a status.
pub fn application<'a>(status: &'a Value, name: &str) -> Option<&'a Value> {
    let applications = status["applications"].as_array()?;
    applications.iter().find(|app| app["name"] == name)
}

/// Events lost, of all classes.
///
/// # Errors
/// If they are not counted by class.
pub fn lost(status: &Value) -> Result<u64> {
    let by_class = status["counters"]["lost"]
        .as_object()
        .context("No loss counters")?;
    ensure!(
        by_class.contains_key("files"),
        "Losses are not counted by class: {by_class:?}"
    );
    Ok(by_class.values().filter_map(Value::as_u64).sum())
}

/// Starts the storm as application `storm`, without an end: see [`calm`].
///
/// # Errors
/// If it does not start.
pub fn storm(vm: &Vm, processes: u32) -> Result<i32> {
    let (endless, seed) = (u32::MAX.to_string(), std::process::id().to_string());
    let program = format!("{TESTS_DIR}/storm");
    let command = [&program, &endless, &processes.to_string(), &seed];
    start(vm, "storm", &command.map(String::as_str), "seed")
}

/// Stops an application in the middle of whatever it does, until [`resume`].
///
/// # Errors
/// If it does not stop.
pub fn calm(vm: &Vm, name: &str) -> Result<()> {
    let cgroup = format!("/sys/fs/cgroup/tracker/{name}");
    vm.write_file(&format!("{cgroup}/cgroup.freeze"), b"1")?;
    let begun = Instant::now();
    while !log(vm, &format!("{cgroup}/cgroup.events")).contains("frozen 1") {
        ensure!(begun.elapsed() < PATIENCE, "{name} cannot be frozen");
        std::thread::sleep(PAUSE);
    }
    Ok(())
}

/// Lets an application go on.
///
/// # Errors
/// If its cgroup is gone.
pub fn resume(vm: &Vm, name: &str) -> Result<()> {
    let freezer = format!("/sys/fs/cgroup/tracker/{name}/cgroup.freeze");
    vm.write_file(&freezer, b"0")
}
