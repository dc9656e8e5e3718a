//! Who is tracked: the processes of the tracked cgroups, whenever they came, and nobody else.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::tracked::{
    PATIENCE, PAUSE, audit, await_line, await_status, calm, end, log, start, start_agent,
    start_beside, status, stop,
};
use super::{Kernels, Scenario};
use crate::payload::TESTS_DIR;
use crate::vm::{Exec, Vm};

/// The scenarios of this file.
pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "tracking_membership_fentry",
        kernels: Kernels::Either,
        configure: |vm| vm,
        run: |vm| membership(vm, "fentry"),
    },
    Scenario {
        name: "tracking_membership_fallback",
        kernels: Kernels::Either,
        configure: |vm| vm,
        run: |vm| membership(vm, "fallback"),
    },
    Scenario {
        name: "tracking_membership_storm_fentry",
        kernels: Kernels::Either,
        configure: |vm| vm,
        run: |vm| storm_moves(vm, "fentry"),
    },
    Scenario {
        name: "tracking_membership_storm_fallback",
        kernels: Kernels::Either,
        configure: |vm| vm,
        run: |vm| storm_moves(vm, "fallback"),
    },
];

const FAMILY: &str = "/root/family.py";

/// Below the mount of cgroup v2; nobody tracks it.
const OUTSIDE: &str = "outside";

/// What an application has.
#[derive(Debug, Default, PartialEq, Eq)]
struct Members {
    pids: BTreeSet<i64>,
    threads: u64,
    descriptors: u64,
}

/// What the kernel says of every application: who is in the cgroups below `tracker`.
fn in_kernel(vm: &Vm) -> Result<BTreeMap<String, Members>> {
    let list = "cd /sys/fs/cgroup/tracker && for f in $(find . -name cgroup.procs); do \
                for p in $(cat $f); do \
                echo $f $p $(ls /proc/$p/task | wc -l) $(ls /proc/$p/fd | wc -l); done; done";
    let list = vm.sh(list)?.check()?.text();
    let mut found = BTreeMap::<String, Members>::new();
    for line in list.lines() {
        let words: Vec<&str> = line.split(' ').collect();
        let [path, pid, threads, descriptors] = words[..] else {
            bail!("{line:?} of {list}");
        };
        let name = path.split('/').nth(1).context(line.to_owned())?;
        let members = found.entry(name.to_owned()).or_default();
        members.pids.insert(pid.parse()?);
        members.threads += threads.parse::<u64>()?;
        members.descriptors += descriptors.parse::<u64>()?;
    }
    Ok(found)
}

/// What the model says of them.
fn in_model(status: &Value) -> Option<BTreeMap<String, Members>> {
    let of = |app: &Value| {
        let pids = app["pids"].as_array()?.iter();
        let members = Members {
            pids: pids.map(Value::as_i64).collect::<Option<_>>()?,
            threads: app["sizes"]["threads"].as_u64()?,
            descriptors: app["sizes"]["descriptors"].as_u64()?,
        };
        Some((app["name"].as_str()?.to_owned(), members))
    };
    status["applications"].as_array()?.iter().map(of).collect()
}

/// The model comes to have who is there by itself, and nobody else; then the audit finds
/// nothing.
fn check(vm: &Vm, when: &str) -> Result<()> {
    let truth = in_kernel(vm)?;
    let all: usize = truth.values().map(|members| members.pids.len()).sum();
    let now = await_status(vm, &format!("{when}: {truth:#?}"), |now| {
        in_model(now).is_some_and(|model| model == truth)
    })?;
    // Somebody might be in the model without belonging to an application.
    let total = &now["total"]["processes"];
    ensure!(
        *total == all,
        "{when}: {total} processes in the model, not {all}"
    );
    let descriptors = truth.values().map(|members| members.descriptors).sum();
    audit(vm, when, descriptors)
}

/// The members of a family by parent, as they have told.
fn told(vm: &Vm, name: &str) -> Vec<(i32, i32)> {
    let text = log(vm, &format!("/root/{name}.log"));
    let number = |word: Option<&str>| word?.parse::<i32>().ok();
    let lines = text.lines().filter_map(|line| line.strip_prefix("ready "));
    let pairs = lines.filter_map(|line| {
        let mut words = line.split(' ');
        Some((number(words.next())?, number(words.next())?))
    });
    pairs.collect()
}

/// Waits until so many of a family are furnished.
fn await_family(vm: &Vm, name: &str, size: usize) -> Result<Vec<(i32, i32)>> {
    let begun = Instant::now();
    loop {
        let family = told(vm, name);
        if family.len() >= size {
            return Ok(family);
        }
        let said = || log(vm, &format!("/root/{name}.log"));
        ensure!(begun.elapsed() < PATIENCE, "{name}: {family:?}\n{}", said());
        std::thread::sleep(PAUSE);
    }
}

/// Has a member of a family fork, and waits for the child.
fn multiply(vm: &Vm, name: &str, parent: i32) -> Result<i32> {
    let size = told(vm, name).len();
    vm.kill(parent, libc::SIGUSR1)?;
    let family = await_family(vm, name, size + 1)?;
    let (child, of) = family[size];
    ensure!(of == parent, "{parent} was to fork: {family:?}");
    Ok(child)
}

/// The only child that a member has.
fn child_of(family: &[(i32, i32)], parent: i32) -> Result<i32> {
    let mut children = family.iter().filter(|(_, of)| *of == parent);
    Ok(children.next().context("No child")?.0)
}

fn move_to(vm: &Vm, cgroup: &str, pids: &[i32]) -> Result<()> {
    let words: Vec<String> = pids.iter().map(ToString::to_string).collect();
    let script = format!(
        "mkdir -p /sys/fs/cgroup/{cgroup} && for pid in {}; do \
         echo $pid > /sys/fs/cgroup/{cgroup}/cgroup.procs || exit 1; done",
        words.join(" ")
    );
    vm.sh(&script)?.check()?;
    Ok(())
}

/// Nothing of a busy program that is not tracked comes into the model. (Events may come: items
/// that leave epoll sets are said of everybody.)
fn strangers(vm: &Vm) -> Result<()> {
    let nothing = |now: &Value| {
        let total = now["total"].as_object().context("No total")?;
        let none = |size: &Value| *size == 0 || *size == serde_json::json!({});
        let (of, counters) = (&now["suspects"], &now["counters"]);
        ensure!(
            total.values().all(none) && none(of) && none(&counters["anomalies"]),
            "Of nobody: {now:#}"
        );
        Ok(counters["readings"].clone())
    };
    let before = nothing(&status(vm)?)?;
    let storm = format!("{TESTS_DIR}/storm");
    let storm = start_beside(vm, "stranger", &[&storm, "500", "2"], "seed")?;
    await_line(vm, "stranger", storm, "storm: still")?;
    // Long enough for events to be read from the rings.
    std::thread::sleep(Duration::from_secs(1));
    let after = nothing(&status(vm)?)?;
    ensure!(before == after, "{before} readings before, {after} after");
    Ok(())
}

fn membership(vm: &Vm, hooks: &str) -> Result<()> {
    vm.write_file(FAMILY, include_bytes!("family.py"))?;
    let agent = start_agent(vm, hooks, &[])?;
    strangers(vm).context("Strangers")?;

    let python = ["python3", FAMILY];
    let home = start(vm, "home", &python, "ready")?;
    await_family(vm, "home", 3)?;
    let father = start_beside(vm, "guests", &python, "ready")?;
    let family = await_family(vm, "guests", 3)?;
    check(vm, "one tracked from its start, one not at all")?;

    let son = child_of(&family, father)?;
    let grandson = child_of(&family, son)?;
    move_to(vm, "tracker/guests", &[father, son, grandson])?;
    check(vm, "a family moved in")?;
    let daughter = multiply(vm, "guests", son)?;
    check(vm, "a child forked inside")?;

    move_to(vm, OUTSIDE, &[son])?;
    check(vm, "one moved out")?;
    let stranger = multiply(vm, "guests", son)?;
    check(vm, "a child forked outside")?;
    ensure!(
        in_kernel(vm)?["guests"].pids == [father, grandson, daughter].map(i64::from).into(),
        "{stranger} was forked outside, {daughter} inside: {:?}",
        in_kernel(vm)?
    );

    move_to(vm, "tracker/home", &[grandson])?;
    check(vm, "one moved from one application to another")?;
    move_to(vm, "tracker/home/inner", &[daughter])?;
    check(vm, "one moved into a cgroup within")?;
    multiply(vm, "guests", daughter)?;
    check(vm, "a child forked there")?;
    move_to(vm, "tracker/guests", &[son, stranger])?;
    check(vm, "those outside moved back in")?;
    move_to(vm, OUTSIDE, &[father, son, stranger])?;
    check(vm, "a family moved out")?;
    // Nobody stays who would have to wait for the end of a child in `home`.
    vm.write_file(&format!("/sys/fs/cgroup/{OUTSIDE}/cgroup.kill"), b"1")?;
    vm.wait(father, PATIENCE)?;
    end(vm, "home", home)?;
    stop(vm, agent)
}

/// Moves everybody from one cgroup to another. Frozen until they are moved, they cannot fork
/// away from the list; whoever is moved goes on at once, with what it shares with the others.
fn move_all(vm: &Vm, from: &str, to: &str) -> Result<()> {
    let script = format!(
        "cd /sys/fs/cgroup && mkdir -p {to} && echo 1 >{from}/cgroup.freeze && \
         until grep -q 'frozen 1' {from}/cgroup.events; do sleep 0.1; done && \
         for pid in $(cat {from}/cgroup.procs); do echo $pid >{to}/cgroup.procs || exit 1; done && \
         echo 0 >{from}/cgroup.freeze && [ -z \"$(cat {from}/cgroup.procs)\" ]"
    );
    vm.exec(Exec::new(["sh", "-c", &script]).timeout(PATIENCE))?
        .check()?;
    Ok(())
}

/// A storm that is moved in, out and in again while it rages is exact once it rests.
fn storm_moves(vm: &Vm, hooks: &str) -> Result<()> {
    let agent = start_agent(vm, hooks, &[])?;
    let (endless, seed) = (u32::MAX, std::process::id());
    let command = format!("{TESTS_DIR}/storm {endless} 3 {seed}");
    let (outside, inside) = (OUTSIDE, "tracker/storm");
    let command = format!(
        "mkdir /sys/fs/cgroup/{outside} && echo $$ >/sys/fs/cgroup/{outside}/cgroup.procs && \
         exec {command}"
    );
    let storm = start_beside(vm, "storm", &["sh", "-c", &command], "seed")?;
    // The dead stay in the cgroup they died in until they are reaped, and cannot be moved.
    let dead = |pid: &i64| log(vm, &format!("/proc/{pid}/stat")).contains(") Z ");
    let known = |now: &Value| {
        let mut pids = in_model(now)?.remove("storm")?.pids;
        pids.retain(|pid| !dead(pid));
        Some(pids)
    };
    let has = |now: &Value| known(now).is_some_and(|pids| pids.contains(&i64::from(storm)));
    let none = |now: &Value| known(now).is_none_or(|pids| pids.is_empty());
    for round in 1..=3 {
        move_all(vm, outside, inside)?;
        await_status(vm, "the storm is tracked", has)?;
        if round < 3 {
            move_all(vm, inside, outside)?;
            await_status(vm, "the storm is not tracked", none)?;
        }
    }
    calm(vm, "storm")?;
    // Not by numbers: threads of the storm have tables of their own, which /proc/PID/fd hides.
    let truth = in_kernel(vm)?;
    let members = &truth.get("storm").context("No storm")?.pids;
    await_status(vm, &format!("all of {members:?}"), |now| {
        known(now).as_ref() == Some(members)
    })?;
    audit(vm, "at rest where it was moved while it raged", 50)?;
    println!("counters {}", status(vm)?["counters"]);
    end(vm, "storm", storm)?;
    stop(vm, agent)
}
