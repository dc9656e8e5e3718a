//! Connections that end while their application is frozen, after the pass over its descriptors.

use anyhow::{Result, ensure};

use super::services::PATIENCE;
use super::{Kernels, Scenario};
use crate::apps;
use crate::image::Kernel;
use crate::vm::{Exec, Vm};

/// The scenarios of this file.
pub const SCENARIOS: &[Scenario] = &[Scenario {
    name: "tcp_ended_frozen",
    kernels: Kernels::Only(Kernel::V6_12),
    configure: |builder| builder,
    run: ended_frozen,
}];

const PROGRAM: &str = "/root/resets.py";
const NAME: &str = "resets";
const DIR: &str = "/root/resets";

/// Reset; closed and then reset, of which reading shows the end and the socket keeps the reset;
/// closed after the restore.
const RESULT: &str = "unread [104, b''] 0; unread [b'', b''] 32; unread [b'', b''] 0";

fn ended_frozen(vm: &Vm) -> Result<()> {
    vm.write_file(PROGRAM, include_bytes!("resets.py"))?;
    vm.sh(&format!("mkdir {DIR}"))?.check()?;
    let run = [
        "tracker", "run", "--name", NAME, "--", "python3", PROGRAM, "server", DIR,
    ];
    vm.spawn(Exec::new(run), Some("/root/resets.log"))?;
    let listens =
        "for i in $(seq 600); do ss -tln | grep -q :7001 && exit 0; sleep 0.1; done; exit 1";
    vm.exec(Exec::new(["sh", "-c", listens]).timeout(PATIENCE))?
        .check()?;
    let cgroup = format!("/sys/fs/cgroup/tracker/{NAME}");
    let peer = ["python3", PROGRAM, "peer", DIR, &cgroup];
    let peer = vm.spawn(Exec::new(peer), Some("/root/peer.log"))?;
    let ready = vm.await_file(&format!("{DIR}/ready"), PATIENCE)?;
    ensure!(ready, "The server is not ready");

    let image = "/root/resets.image";
    let checkpoint = apps::checkpoint(NAME, image, &[]).timeout(PATIENCE);
    vm.exec(checkpoint.env("TRACKER_FAULT", "memory:slow"))?
        .check()?;
    let restore = Exec::new(["tracker", "restore", "--image", image, "--detach"]);
    vm.exec(restore.timeout(PATIENCE))?.check()?;

    vm.write_file(&format!("{DIR}/go"), b"")?;
    let result = format!("{DIR}/result");
    ensure!(vm.await_file(&result, PATIENCE)?, "The server does not end");
    let result = String::from_utf8(vm.read_file(&result)?)?;
    ensure!(result == RESULT, "{result}");
    let ended = vm.wait(peer, PATIENCE)?;
    ensure!(ended.is_some(), "The peer does not end");
    Ok(())
}
