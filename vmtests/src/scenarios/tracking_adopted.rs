//! Sockets that tracked processes have and did not make: what others do to them is followed.

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::tracked::{
    PATIENCE, audit, await_line, await_status, end, log, start, start_agent, start_beside, status,
    stop,
};
use super::{Kernels, Scenario};
use crate::vm::Vm;

/// The scenarios of this file.
pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "tracking_adopted_fentry",
        kernels: Kernels::Either,
        configure: |vm| vm,
        run: |vm| adopted(vm, "fentry"),
    },
    Scenario {
        name: "tracking_adopted_fallback",
        kernels: Kernels::Either,
        configure: |vm| vm,
        run: |vm| adopted(vm, "fallback"),
    },
];

const PROGRAM: &str = "/root/visits.py";

/// Thousands of events, after which the model forgets what has no descriptor any more.
const BURST: [&str; 3] = [
    "python3",
    "-c",
    "import os, time\nfor n in range(6000): os.umask(n % 8)\nprint('done', flush=True)\n\
     time.sleep(1e6)",
];

/// A server with a listener, and a client that nobody tracks.
struct Visits<'a> {
    vm: &'a Vm,
    /// Of the server, and of its application.
    name: &'static str,
    keeper: i32,
    server: i32,
    client: i32,
}

impl<'a> Visits<'a> {
    /// Of a server that is not tracked.
    fn outside(vm: &'a Vm, name: &'static str, family: &str) -> Result<Self> {
        let command = ["python3", PROGRAM, "server", family];
        let keeper = start_beside(vm, name, &command, "server ")?;
        Self::of(vm, name, family, keeper)
    }

    /// Of a server that is tracked from its start.
    fn inside(vm: &'a Vm, name: &'static str, family: &str) -> Result<Self> {
        let command = ["python3", PROGRAM, "server", family];
        let keeper = start(vm, name, &command, "server ")?;
        Self::of(vm, name, family, keeper)
    }

    fn of(vm: &'a Vm, name: &'static str, family: &str, keeper: i32) -> Result<Self> {
        let said = log(vm, &format!("/root/{name}.log"));
        let server = said.lines().find_map(|line| line.strip_prefix("server "));
        let server = server.context("No server")?.parse()?;
        let command = ["python3", PROGRAM, "client", family];
        let client = start_beside(vm, &client_of(name), &command, "client")?;
        Ok(Self {
            vm,
            name,
            keeper,
            server,
            client,
        })
    }

    fn move_server_in(&self) -> Result<()> {
        let script = format!(
            "cd /sys/fs/cgroup/tracker && mkdir {0} && echo {1} >{0}/cgroup.procs",
            self.name, self.server
        );
        self.vm.sh(&script)?.check()?;
        Ok(())
    }

    /// Has the client connect, as its connection of this number, and the server accept it.
    fn visit(&self, number: u32) -> Result<()> {
        let vm = self.vm;
        self.have_client(libc::SIGUSR1, &format!("connected {number}"))?;
        vm.kill(self.server, libc::SIGUSR1)?;
        await_line(vm, self.name, self.keeper, &format!("accepted {number}"))
    }

    fn have_client(&self, signal: i32, line: &str) -> Result<()> {
        self.vm.kill(self.client, signal)?;
        await_line(self.vm, &client_of(self.name), self.client, line)
    }

    /// What only others do to the sockets of the server is in the model; `silent` says that it
    /// is so without reading anything.
    fn are_followed(&self, when: &str, silent: bool) -> Result<()> {
        let vm = self.vm;
        audit(vm, &format!("{when}, before"), 5)?;
        let before = status(vm)?;
        let unread = |now: &Value, until: &str| {
            ensure!(
                !silent || reading(now) == reading(&before),
                "{when}: {:#} before, {:#} {until}",
                before["counters"],
                now["counters"]
            );
            Ok(())
        };
        self.have_client(libc::SIGUSR2, "shut")?;
        self.have_client(libc::SIGALRM, "reset")?;
        vm.kill(self.client, libc::SIGKILL)?;
        vm.wait(self.client, PATIENCE)?;
        let now = await_status(vm, "all events are applied", |now| now["lag"] == 0)?;
        unread(&now, "after")?;
        audit(vm, &format!("{when}, the client shut, reset and left"), 5)?;
        // The audit reads what is suspect first.
        unread(&status(vm)?, "after the audit")
    }

    /// Whoever made the listener has it, too.
    fn keep(&self, when: &str) -> Result<()> {
        self.vm.kill(self.keeper, libc::SIGUSR2)?;
        await_line(self.vm, self.name, self.keeper, "kept")?;
        audit(self.vm, &format!("{when}, the keeper listened again"), 5)
    }

    fn end(self) -> Result<()> {
        let vm = self.vm;
        vm.kill(self.keeper, libc::SIGKILL)?;
        end(vm, self.name, self.keeper)?;
        vm.sh("rm -f /root/visits.sock")?.check()?;
        Ok(())
    }
}

fn client_of(server: &str) -> String {
    format!("{server}-client")
}

/// What the model has read, and what it wondered about.
fn reading(status: &Value) -> [Value; 3] {
    let counters = &status["counters"];
    ["readings", "resyncs", "anomalies"].map(|name| counters[name].clone())
}

fn count(status: &Value) -> u64 {
    status["counters"]["adopted"].as_u64().unwrap_or(u64::MAX)
}

fn adopted(vm: &Vm, hooks: &str) -> Result<()> {
    vm.write_file(PROGRAM, include_bytes!("visits.py"))?;
    let fentry = hooks == "fentry";
    let agent = start_agent(vm, hooks, &[])?;
    let moved = Visits::outside(vm, "moved", "tcp")?;
    moved.visit(1)?;
    moved.move_server_in()?;
    audit(vm, "a server moved in", 5)?;
    // The second is accepted inside, of a listener made outside.
    for number in 2..=3 {
        moved.visit(number)?;
    }
    moved.are_followed("moved in", true)?;
    if fentry {
        moved.keep("moved in")?;
    }
    let most = count(&status(vm)?);
    ensure!(most >= 4, "{most} sockets are followed");
    moved.end()?;
    let burst = start(vm, "burst", &BURST, "done")?;
    await_status(vm, "nothing is left to follow", |now| count(now) == 0)?;
    end(vm, "burst", burst)?;

    // Without fentry no hook tells of the other end of a Unix connection: an audit asks.
    let local = Visits::outside(vm, "local", "unix")?;
    local.visit(1)?;
    local.move_server_in()?;
    for number in 2..=3 {
        local.visit(number)?;
    }
    local.are_followed("a Unix server moved in", fentry)?;
    local.end()?;

    // A connection of a Unix listener is made by who connects.
    let native = Visits::inside(vm, "native", "unix")?;
    for number in 1..=3 {
        native.visit(number)?;
    }
    native.are_followed("a Unix server from its start", fentry)?;
    native.end()?;
    stop(vm, agent)?;

    // There before the agent.
    let early = Visits::outside(vm, "early", "tcp")?;
    early.visit(1)?;
    early.move_server_in()?;
    let agent = start_agent(vm, hooks, &[])?;
    for number in 2..=3 {
        early.visit(number)?;
    }
    early.are_followed("there before the agent", true)?;
    early.end()?;
    stop(vm, agent)
}
