//! Machines that have booted once, for others to go on from.
//!
//! A boot takes ten seconds and more under emulation, and a run of all tests starts a hundred
//! machines of few shapes. The first of each shape is saved when its guest says hello, and every
//! one is loaded from there: memory, devices, and a disk on top of the saved one. What differs
//! from a boot: the random numbers begin alike, and the clock is set from the host's.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use anyhow::{Context, Result, bail};

use super::builder::{Shape, VmBuilder, path};
use super::monitor::Monitor;
use super::qemu::WorkDir;
use crate::image::Image;
use crate::protocol::Hello;

/// The templates of one run, made when they are first asked for.
#[derive(Debug, Default)]
pub(super) struct Templates(Mutex<HashMap<Shape, Slot>>);

/// One that is made by whoever has it locked.
type Slot = Arc<Mutex<Option<Arc<Template>>>>;

/// A machine in files.
#[derive(Debug)]
pub(super) struct Template {
    dir: WorkDir,
    /// What its guest said last.
    pub hello: Hello,
    /// The console until then.
    pub log: Vec<String>,
}

impl Templates {
    /// The machine of this shape.
    ///
    /// # Errors
    /// If it does not boot or cannot be saved.
    pub fn get(&self, builder: &VmBuilder) -> Result<Arc<Template>> {
        let slot = {
            let mut slots = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            Arc::clone(slots.entry(builder.shape()).or_default())
        };
        let mut slot = slot.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(template) = &*slot {
            return Ok(Arc::clone(template));
        }
        let template = Arc::new(Template::make(builder)?);
        *slot = Some(Arc::clone(&template));
        Ok(template)
    }
}

impl Template {
    fn make(builder: &VmBuilder) -> Result<Template> {
        let dir = WorkDir::create(builder.workspace(), false)?;
        let mut template = Template {
            dir,
            hello: Hello::default(),
            log: Vec::new(),
        };
        make_overlay(&template.disk())?;
        let vm = builder.clone().boot_template(&template)?;
        let begun = Instant::now();
        let file = template.memory();
        Monitor::connect(&vm.dir.monitor())
            .and_then(|mut monitor| monitor.save(path(&file)?))
            .with_context(|| vm.qemu_said())?;
        template.hello = vm.hello();
        template.log = vm.console();
        let (seconds, size) = (begun.elapsed().as_secs_f32(), fs::metadata(&file)?.len());
        eprintln!("vm: saved in {seconds:.1} s, {} MiB", size >> 20);
        Ok(template)
    }

    /// The root disk: an overlay on the image's.
    pub fn disk(&self) -> PathBuf {
        self.dir.path.join("root.qcow2")
    }

    /// The disk with our programs.
    pub fn programs(&self) -> PathBuf {
        self.dir.programs()
    }

    /// Memory and devices.
    pub fn memory(&self) -> PathBuf {
        self.dir.path.join("machine")
    }
}

/// An empty disk on top of the image's.
fn make_overlay(disk: &Path) -> Result<()> {
    let output = Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b"])
        .args([&Image::locate()?.root(), disk])
        .output()
        .context("Run qemu-img (see `cargo xtask setup`)")?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("qemu-img: {}", said.trim());
    }
    Ok(())
}
