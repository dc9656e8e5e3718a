//! QEMU's machine protocol, as far as saving and loading a machine needs it
//! (docs/interop/qmp-spec.rst of QEMU).

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use crate::protocol::shell_words;

/// Time for saving or loading a machine's memory, and for any answer.
const PATIENCE: Duration = Duration::from_secs(120);

/// Time between two questions.
const PAUSE: Duration = Duration::from_millis(20);

/// A connection to QEMU.
pub(super) struct Monitor {
    reader: BufReader<UnixStream>,
    writer: UnixStream,
}

impl Monitor {
    /// Connects to QEMU's `-qmp` socket.
    ///
    /// # Errors
    /// If QEMU is not there.
    pub fn connect(socket: &Path) -> Result<Monitor> {
        let writer = UnixStream::connect(socket).context("Connect to QEMU's monitor")?;
        writer.set_read_timeout(Some(PATIENCE))?;
        let reader = BufReader::new(writer.try_clone()?);
        let mut monitor = Monitor { reader, writer };
        monitor.line()?;
        monitor.execute("qmp_capabilities", &json!({}))?;
        Ok(monitor)
    }

    /// Writes the machine into a file. It stands still afterwards, its disks written out.
    ///
    /// # Errors
    /// If QEMU cannot.
    pub fn save(&mut self, file: &str) -> Result<()> {
        self.execute("stop", &json!({}))?;
        // 128 MiB/s unless told.
        let fast = json!({ "max-bandwidth": 1u64 << 40 });
        self.execute("migrate-set-parameters", &fast)?;
        let uri = format!("exec:cat >{}", shell_words([file]));
        self.execute("migrate", &json!({ "uri": uri }))?;
        self.until("query-migrate", |status| match status {
            "completed" => Ok(true),
            "failed" | "cancelled" => bail!("QEMU cannot save the machine"),
            _ => Ok(false),
        })
    }

    /// Waits until the machine has been read that QEMU was started with, and lets it run.
    ///
    /// # Errors
    /// If QEMU has gone or takes too long.
    pub fn resume_loaded(&mut self) -> Result<()> {
        self.until("query-status", |status| Ok(status != "inmigrate"))?;
        self.execute("cont", &json!({})).map(drop)
    }

    fn until(&mut self, question: &str, done: impl Fn(&str) -> Result<bool>) -> Result<()> {
        let begun = Instant::now();
        loop {
            let answer = self.execute(question, &json!({}))?;
            if done(answer["status"].as_str().unwrap_or_default())? {
                return Ok(());
            }
            ensure!(begun.elapsed() < PATIENCE, "{question}: {answer}");
            std::thread::sleep(PAUSE);
        }
    }

    fn execute(&mut self, command: &str, arguments: &Value) -> Result<Value> {
        let request = json!({ "execute": command, "arguments": arguments });
        writeln!(self.writer, "{request}").with_context(|| format!("QEMU: {command}"))?;
        loop {
            let mut answer = self.line().with_context(|| format!("QEMU: {command}"))?;
            if let Some(error) = answer.get("error") {
                bail!("QEMU: {command}: {error}");
            }
            // Events come in between.
            if let Some(answer) = answer.get_mut("return") {
                return Ok(answer.take());
            }
        }
    }

    fn line(&mut self) -> Result<Value> {
        let mut line = String::new();
        let length = self.reader.read_line(&mut line).context("Read")?;
        ensure!(length > 0, "QEMU has closed its monitor");
        serde_json::from_str(&line).context(line)
    }
}

/// The URI of a machine in a file, for `-incoming`.
pub(super) fn saved(file: &str) -> String {
    format!("exec:cat {}", shell_words([file]))
}
