//! Registers of frozen threads: what the iterator tells against what ptrace(2) does.

use std::fs;
use std::hint::black_box;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use tracker::bpf::features::cgroup2_mount;
use tracker::bpf::iter::{Iterators, Scope};
use tracker::model::ids::{Pid, Tid};
use tracker::sys::cgroup::{Cgroup, Event};
use tracker::sys::ptrace::{self, Options};

use crate::sys::{Child, fork_running};

/// Computing and waiting, with and without extended registers in use.
const PROGRAMS: &[fn()] = &[integers, floats, vectors, waits];
const ROUNDS: usize = 25;
/// The masks of MXCSR, which ptrace(2) takes from elsewhere if MXCSR is not in use.
const MXCSR_MASK: std::ops::Range<usize> = 28..32;

fn integers() {
    let mut sum = 1_u64;
    loop {
        sum = black_box(sum.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1));
    }
}

fn floats() {
    let mut sum = 1.0_f64;
    loop {
        sum = black_box(sum.mul_add(1.000_1, 0.1) % 1e9);
    }
}

/// With all that this processor has of SSE, AVX and AVX-512, whichever the compiler's features are.
fn vectors() {
    loop {
        vectors::fill();
    }
}

fn waits() {
    loop {
        std::thread::sleep(Duration::from_micros(50));
        vectors::fill();
    }
}

#[cfg(target_arch = "x86_64")]
mod vectors {
    use std::arch::asm;

    /// Puts something into registers of each kind, and leaves it there.
    pub fn fill() {
        // SAFETY: the registers are declared clobbered; x87 is left as it was found.
        unsafe {
            asm!(
                "fld1",
                "fldpi",
                "faddp",
                "fstp st(0)",
                options(nomem, nostack)
            );
            asm!("pcmpeqd xmm5, xmm5", out("xmm5") _, options(nomem, nostack));
        }
        if std::is_x86_feature_detected!("avx2") {
            // SAFETY: the processor has them.
            unsafe {
                asm!("vpcmpeqd ymm6, ymm6, ymm6", out("ymm6") _, options(nomem, nostack));
            }
        }
        if std::is_x86_feature_detected!("avx512f") {
            // SAFETY: the processor has them.
            unsafe {
                asm!(
                    "vpternlogd zmm19, zmm19, zmm19, 255",
                    "kxnorw k3, k3, k3",
                    out("zmm19") _, out("k3") _, options(nomem, nostack)
                );
            }
        }
        for _ in 0..100 {
            std::hint::spin_loop();
        }
    }
}

pub fn frozen_registers(iterators: &mut Iterators) -> Result<()> {
    let dir = cgroup2_mount()?.join(format!("iter-check-{}", std::process::id()));
    fs::create_dir(&dir).with_context(|| format!("Create {}", dir.display()))?;
    let result = compare(iterators, &dir);
    let removed = (0..100).any(|_| {
        std::thread::sleep(Duration::from_millis(10));
        fs::remove_dir(&dir).is_ok()
    });
    ensure!(removed, "Cannot remove {}", dir.display());
    result
}

fn compare(iterators: &mut Iterators, dir: &Path) -> Result<()> {
    let scope = Scope::Cgroup(fs::metadata(dir)?.ino());
    let cgroup = Cgroup::open(dir)?;
    let mut children: Vec<Child> = Vec::new();
    for program in PROGRAMS {
        let child = fork_running(*program)?;
        cgroup.add(Pid(child.0))?;
        children.push(child);
    }
    let mut features = 0;
    let mut told = 0;
    for round in 0..ROUNDS {
        std::thread::sleep(Duration::from_millis(2));
        cgroup.set_frozen(true)?;
        cgroup.wait(
            Event::Frozen,
            Instant::now() + Duration::from_secs(20),
            None,
        )?;
        let tasks = iterators.frozen_tasks(scope)?;
        ensure!(
            tasks.threads.len() == PROGRAMS.len(),
            "{} threads",
            tasks.threads.len()
        );
        for (tid, record) in tasks.registers {
            let tid = Tid(tid.cast_signed());
            ptrace::seize(tid, Options::SYSGOOD)?;
            ptrace::interrupt(tid)?;
            ptrace::wait_stop(tid)?;
            let general = ptrace::registers(tid)?;
            ensure!(
                record.general == general,
                "round {round}: {:x?} where ptrace has {general:x?}",
                record.general
            );
            let mut ours = record.extended;
            let mut theirs = ptrace::xstate(tid)?;
            ours[MXCSR_MASK].fill(0);
            theirs[MXCSR_MASK].fill(0);
            let differs = ours.iter().zip(&theirs).position(|(a, b)| a != b);
            ensure!(
                differs.is_none() && ours.len() == theirs.len(),
                "round {round}: {} bytes, {} by ptrace; they differ at {differs:?}",
                ours.len(),
                theirs.len()
            );
            let present = theirs[512..].first_chunk::<8>();
            features |= present.map_or(0, |bits| u64::from_le_bytes(*bits));
            ptrace::detach(tid)?;
            told += 1;
        }
        cgroup.set_frozen(false)?;
    }
    println!("{told} records, features {features:#x}");
    // One that has not quite left its CPU is not told: most have.
    ensure!(told > ROUNDS * PROGRAMS.len() / 2, "{told} records only");
    ensure!(features & 7 == 7, "features {features:#x} only");
    Ok(())
}
