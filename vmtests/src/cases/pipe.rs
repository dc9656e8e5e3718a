//! Pipes.

use std::io::{Read, Write};

use anyhow::{Context, Result, ensure};

use crate::guest::case::{Case, Entry};

/// The cases of this file.
pub const CASES: &[Entry] = &[Entry::carried("pipe_data", data)];

/// Bytes in a pipe stay there, and both ends stay connected.
fn data(case: &Case) -> Result<()> {
    let (mut reader, mut writer) = std::io::pipe()?;
    writer.write_all(b"before")?;
    case.ready()?;
    writer
        .write_all(b" and after")
        .context("Write to the restored pipe")?;
    drop(writer);
    let mut text = String::new();
    reader
        .read_to_string(&mut text)
        .context("Read from the restored pipe")?;
    ensure!(text == "before and after", "The pipe held {text:?}");
    Ok(())
}
