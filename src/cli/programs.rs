//! `tracker check --programs`: every BPF object loaded and attached, and what the kernel made of it.

use crate::bpf::accept::Handshakes;
use crate::bpf::iter::Iterators;
use crate::bpf::netlock::NetLock;
use crate::bpf::programs::{ProgramStats, Programs};
use crate::bpf::track::{HookSet, Hooks};
use crate::error::ExitCode;
use comfy_table::{CellAlignment, Table, presets};
use serde::Serialize;
use std::error::Error;

/// What became of one BPF object.
#[derive(Serialize)]
struct Object {
    name: &'static str,
    /// Why the kernel did not take it; it has no programs then.
    refused: Option<String>,
    programs: Vec<Program>,
    /// Programs that were not loaded: the kernel has no such function or tracepoint.
    absent: Vec<&'static str>,
}

#[derive(Serialize)]
struct Program {
    #[serde(flatten)]
    stats: ProgramStats,
    /// Why the kernel did not attach it.
    not_attached: Option<String>,
}

/// An object that was loaded and attached as far as the kernel let it be.
#[derive(Default)]
struct Loaded {
    programs: Programs,
    not_attached: Vec<(&'static str, String)>,
    absent: Vec<&'static str>,
}

type Outcome = Result<Loaded, Box<dyn Error>>;

/// Prints the table; ends with 4 if an object was refused or a program not attached. The
/// fentry set may be: the fallback stands in for it. So may what old kernels cannot do.
pub(super) fn run(json: bool) -> ExitCode {
    let objects = [
        look("track-fentry", hooks(HookSet::Fentry)),
        look("track-fallback", hooks(HookSet::Fallback)),
        look("iter", iterators()),
        look("accept", handshakes()),
        look("netlock", network_lock()),
    ];
    if json {
        super::print_json(&objects);
    } else {
        print(&objects);
    }
    let whole = |object: &Object| {
        let attached = object.programs.iter().all(|one| one.not_attached.is_none());
        object.refused.is_none() && attached
    };
    let [fentry, fallback, iterators, accept, lock] = &objects;
    let needed = [fallback, iterators, lock].into_iter().all(whole);
    let optional = |object: &Object| object.refused.is_some() || whole(object);
    match needed && optional(fentry) && optional(accept) {
        true => ExitCode::Done,
        false => ExitCode::Unsupported,
    }
}

fn hooks(set: HookSet) -> Outcome {
    // No cgroup is tracked, so the programs end at once; detached with the value.
    let hooks = Hooks::load_anyhow(set)?;
    Ok(Loaded {
        programs: hooks.programs().clone(),
        not_attached: hooks.not_attached.clone(),
        absent: hooks.absent.clone(),
    })
}

fn iterators() -> Outcome {
    // Loading attaches them, too.
    Ok(Loaded {
        programs: Iterators::load()?.programs()?,
        ..Loaded::default()
    })
}

fn handshakes() -> Outcome {
    // Attached, too; it waits for packets that nobody sends.
    Ok(Loaded {
        programs: Handshakes::attach()?.programs()?,
        ..Loaded::default()
    })
}

fn network_lock() -> Outcome {
    let mut lock = NetLock::load(0)?;
    let programs = lock.programs()?;
    // Nothing was added to it, so that it lets everything pass.
    let attached = lock.engage();
    lock.release()?;
    let not_attached = match attached {
        Ok(()) => Vec::new(),
        // Both or none: it does not stay half attached.
        Err(error) => ["lock_egress", "lock_ingress"]
            .map(|name| (name, super::chain(&error)))
            .into(),
    };
    Ok(Loaded {
        programs,
        not_attached,
        absent: Vec::new(),
    })
}

fn look(name: &'static str, outcome: Outcome) -> Object {
    let looked = outcome.and_then(|loaded| {
        let programs = loaded.programs.stats()?.into_iter().map(|stats| {
            let failures = &loaded.not_attached;
            let failure = failures.iter().find(|(program, _)| *program == stats.name);
            Program {
                not_attached: failure.map(|(_, why)| why.clone()),
                stats,
            }
        });
        Ok((programs.collect(), loaded.absent))
    });
    let (refused, (programs, absent)) = match looked {
        Ok(found) => (None, found),
        Err(error) => (Some(super::chain(&*error)), Default::default()),
    };
    Object {
        name,
        refused,
        programs,
        absent,
    }
}

fn print(objects: &[Object]) {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING).set_header([
        "OBJECT", "PROGRAM", "VERIFIED", "XLATED", "JITED", "MISSES", "ATTACHED",
    ]);
    for column in 2..6 {
        if let Some(column) = table.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    for object in objects {
        for program in &object.programs {
            let stats = &program.stats;
            table.add_row([
                object.name.to_owned(),
                stats.name.clone(),
                stats.verified_insns.to_string(),
                stats.xlated_bytes.to_string(),
                stats.jited_bytes.to_string(),
                stats.recursion_misses.to_string(),
                match &program.not_attached {
                    None => "yes".to_owned(),
                    Some(why) => format!("NO: {why}"),
                },
            ]);
        }
    }
    println!("{table}");
    for object in objects {
        if let Some(why) = &object.refused {
            println!("{} was refused: {why}", object.name);
        }
        if !object.absent.is_empty() {
            let absent = object.absent.join(" ");
            println!("{} not in this kernel: {absent}", object.name);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refused_object_says_why() {
        let error = std::io::Error::other("the verifier said no");
        let object = look("iter", Err(error.into()));
        assert_eq!(object.refused.as_deref(), Some("the verifier said no"));
        assert!(object.programs.is_empty());
    }
}
