//! Guest program: makes kernel objects of known state and asserts that the BPF iterators and the
//! network lock report and hold them so, on the kernel at hand.
//!
//! `iter_check` runs everything that leaves the rest of the machine alone; `iter_check --all` also
//! what locks all TCP of the machine for a moment; `iter_check --idle-hooks fentry|fallback` attaches
//! the hooks of a set with nothing to do, until it is killed.

mod choices;
mod files;
mod lock;
mod registers;
mod scope;
mod sets;
mod sys;
mod tasks;
mod vmas;

use anyhow::{Context, Result, bail};
use tracker::bpf::features::Features;
use tracker::bpf::iter::Iterators;
use tracker::bpf::track::{HookSet, Hooks, Options};

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let everything = match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [] => false,
        ["--all"] => true,
        ["--idle-hooks", "fentry"] => return idle_hooks(HookSet::Fentry),
        ["--idle-hooks", "fallback"] => return idle_hooks(HookSet::Fallback),
        _ => bail!("Unknown arguments {arguments:?}"),
    };
    let features = Features::probe();
    println!("{}", serde_json::to_string_pretty(&features)?);

    let mut iterators = Iterators::load()?;
    type Check = fn(&mut Iterators) -> Result<()>;
    let checks: &[(&str, Check)] = &[
        ("threads", tasks::threads),
        ("process", tasks::process),
        ("address space", tasks::address_space),
        ("signal actions", tasks::signal_actions),
        ("posix timers", tasks::posix_timers),
        ("restart block", tasks::restart_block),
        ("zombie", tasks::zombie),
        ("descriptor set", files::descriptor_set),
        ("descriptor table of a thread", files::own_table),
        ("regular files", files::regular_files),
        ("pipes", files::pipes),
        ("event files", files::event_files),
        ("memfd and pidfd", files::memfd_and_pidfd),
        ("unix sockets", files::unix_sockets),
        ("inet sockets", files::inet_sockets),
        ("options of sockets", choices::choices),
        ("epoll", sets::epoll),
        ("epoll overflow", sets::epoll_overflow),
        ("inotify", sets::inotify),
        ("locks", sets::locks),
        ("mappings", vmas::mappings),
        ("cgroup scope", scope::cgroup_scope),
        ("registers of frozen threads", registers::frozen_registers),
    ];
    for (name, check) in checks {
        check(&mut iterators).with_context(|| format!("Check of {name}"))?;
        println!("ok {name}");
    }
    type LockCheck = fn() -> Result<()>;
    let locks: &[(&str, LockCheck, bool)] = &[
        ("a connection", lock::connection, true),
        ("a listener", lock::listener, true),
        ("new connections", lock::new_only, true),
        ("IPv6 and UDP", lock::addresses, true),
        ("a cgroup", lock::cgroup, true),
        ("what was pinned", lock::pinned, true),
        ("all TCP", lock::all_tcp, everything),
    ];
    for (name, check, _) in locks.iter().filter(|(_, _, wanted)| *wanted) {
        check().with_context(|| format!("Lock of {name}"))?;
        println!("ok lock of {name}");
    }
    Ok(())
}

/// For `cargo xtask overhead`: what hooks cost that do nothing.
fn idle_hooks(set: HookSet) -> Result<()> {
    let options = Options {
        set: Some(set),
        ..Options::default()
    };
    let hooks = Hooks::load(&options, &[])?;
    println!("attached {}", hooks.attached.len());
    loop {
        std::thread::park();
    }
}
