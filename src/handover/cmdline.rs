//! Kernel command lines: what the running one says and what the next one gets.

use std::fmt::Write;

/// Where the early-boot stage is installed: the next kernel's `init=`.
pub const EARLY: &str = "/usr/lib/tracker/early";

/// Word that hands the real init on.
const INIT_WORD: &str = "tracker.init=";
/// Word that tells where the image lies: physical address of the arena.
const IMAGE_WORD: &str = "tracker.image=";

/// Word that tells how long one application's restore may take, and all of them: seconds.
const DEADLINE_WORD: &str = "tracker.deadline=";

/// Bytes of a command line on x86 with its final NUL (`COMMAND_LINE_SIZE`).
const COMMAND_LINE_SIZE: usize = 2048;

/// A range of physical memory kept out of the kernel's hands by `memmap=SIZE!ADDRESS`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reservation {
    /// First byte.
    pub address: u64,
    /// Length in bytes.
    pub size: u64,
}

/// The command line does not fit.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "The next kernel's command line would have {0} bytes, the kernel takes 2047; shorten --append"
)]
pub struct TooLong(usize);

/// Splits a command line at blanks outside double quotes (next_arg() in lib/cmdline.c).
fn words(line: &str) -> Vec<&str> {
    let mut quoted = false;
    let blank = move |c: char| {
        quoted ^= c == '"';
        !quoted && c.is_ascii_whitespace()
    };
    line.split(blank).filter(|word| !word.is_empty()).collect()
}

/// The words for the kernel, and those after `--` for init.
fn halves(line: &str) -> (Vec<&str>, Vec<&str>) {
    let mut all = words(line);
    match all.iter().position(|word| *word == "--") {
        Some(at) => {
            let init = all.split_off(at);
            (all, init[1..].to_vec())
        }
        None => (all, Vec::new()),
    }
}

fn last_value<'a>(words: &[&'a str], key: &str) -> Option<&'a str> {
    let value = |word: &&'a str| word.strip_prefix(key);
    words.iter().rev().find_map(value)
}

/// The reservations on a command line, in its order.
#[must_use]
pub fn reservations(line: &str) -> Vec<Reservation> {
    let (kernel, _) = halves(line);
    let ranges = kernel
        .iter()
        .filter_map(|word| word.strip_prefix("memmap="));
    ranges
        .flat_map(|ranges| ranges.split(','))
        .filter_map(|range| {
            let (size, address) = range.split_once('!')?;
            Some(Reservation {
                address: size_with_suffix(address)?,
                size: size_with_suffix(size)?,
            })
        })
        .collect()
}

/// A number as memparse() in lib/cmdline.c reads it.
fn size_with_suffix(text: &str) -> Option<u64> {
    let (digits, shift) = match text.char_indices().last()? {
        (at, 'k' | 'K') => (&text[..at], 10),
        (at, 'm' | 'M') => (&text[..at], 20),
        (at, 'g' | 'G') => (&text[..at], 30),
        _ => (text, 0),
    };
    let hex = digits.strip_prefix("0x").or(digits.strip_prefix("0X"));
    let number = match hex {
        Some(hex) => u64::from_str_radix(hex, 16).ok()?,
        None => digits.parse().ok()?,
    };
    number.checked_shl(shift).filter(|n| n >> shift == number)
}

/// How long a restore may take before the machine goes on without it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Deadlines {
    /// One application until it stands, and all of them from then until they run: seconds.
    pub application: u32,
    /// All of them, in seconds.
    pub all: u32,
}

impl Default for Deadlines {
    fn default() -> Self {
        Self::of(60, 2)
    }
}

impl Deadlines {
    /// For this many applications, which are restored one after another and then let run.
    #[must_use]
    pub fn of(application: u32, applications: usize) -> Self {
        /// What the stage needs beside them: modules, network, reading the image.
        const STAGE: u32 = 60;
        let applications = u32::try_from(applications).unwrap_or(u32::MAX);
        Self {
            application,
            all: application
                .saturating_mul(applications.saturating_add(1))
                .saturating_add(STAGE),
        }
    }

    fn parse(text: &str) -> Option<Self> {
        let (application, all) = text.split_once(',')?;
        Some(Self {
            application: application.parse().ok()?,
            all: all.parse().ok()?,
        })
    }
}

/// The next kernel's command line: the running one with our init, the arena's address and the
/// deadlines, and the operator's words behind it.
///
/// # Errors
/// [`TooLong`].
pub fn next(
    running: &str,
    arena: Reservation,
    deadlines: Deadlines,
    append: &str,
) -> Result<String, TooLong> {
    let (mut kernel, init) = halves(running);
    let (more, more_init) = halves(append);
    // A test's fault is for one update.
    kernel.retain(|word| !word.starts_with("TRACKER_FAULT="));
    kernel.extend(more);
    let real_init = last_value(&kernel, "init=")
        .filter(|path| *path != EARLY)
        .or(last_value(&kernel, INIT_WORD));
    let dropped = [
        "BOOT_IMAGE=",
        "initrd=",
        "init=",
        INIT_WORD,
        IMAGE_WORD,
        DEADLINE_WORD,
    ];
    let kept = kernel.iter().filter(|word| {
        !matches!(**word, "ro" | "rw") && !dropped.iter().any(|key| word.starts_with(key))
    });
    let mut line = String::new();
    for word in kept {
        line.push_str(word);
        line.push(' ');
    }
    // Writing to a String does not fail.
    let _ = write!(
        line,
        "rw init={EARLY} {IMAGE_WORD}{:#x} {DEADLINE_WORD}{},{}",
        arena.address, deadlines.application, deadlines.all
    );
    if let Some(path) = real_init {
        let _ = write!(line, " {INIT_WORD}{path}");
    }
    let for_init = [init, more_init].concat();
    if !for_init.is_empty() {
        let _ = write!(line, " -- {}", for_init.join(" "));
    }
    if line.len() < COMMAND_LINE_SIZE {
        Ok(line)
    } else {
        Err(TooLong(line.len()))
    }
}

/// What the previous kernel's `tracker update` left for the early-boot stage.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Handed {
    /// Physical address of the arena with the image.
    pub arena: Option<u64>,
    /// The real init, where the machine had one on its command line.
    pub init: Option<String>,
    /// How long to try.
    pub deadlines: Deadlines,
}

impl Handed {
    /// Reads them from a command line.
    #[must_use]
    pub fn parse(line: &str) -> Self {
        let (kernel, _) = halves(line);
        Self {
            arena: last_value(&kernel, IMAGE_WORD).and_then(size_with_suffix),
            init: last_value(&kernel, INIT_WORD).map(str::to_owned),
            deadlines: last_value(&kernel, DEADLINE_WORD)
                .and_then(Deadlines::parse)
                .unwrap_or_default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ARENA: Reservation = Reservation {
        address: 2 << 30,
        size: 960 << 20,
    };

    fn check(running: &str, append: &str, expect: &str) {
        assert_eq!(
            next(running, ARENA, Deadlines::of(30, 2), append).unwrap(),
            expect
        );
    }

    #[test]
    fn the_running_line_is_handed_on() {
        check(
            "BOOT_IMAGE=/vmlinuz root=/dev/vda ro quiet memmap=960M!2G initrd=/initrd.img",
            "",
            "root=/dev/vda quiet memmap=960M!2G rw init=/usr/lib/tracker/early \
             tracker.image=0x80000000 tracker.deadline=30,150",
        );
    }

    #[test]
    fn the_real_init_survives_one_update_and_two() {
        let once = next(
            "root=/dev/vda init=/bin/systemd rw",
            ARENA,
            Deadlines::of(30, 2),
            "",
        )
        .unwrap();
        let expect = "root=/dev/vda rw init=/usr/lib/tracker/early tracker.image=0x80000000 tracker.deadline=30,150 \
                      tracker.init=/bin/systemd";
        assert_eq!(once, expect);
        assert_eq!(
            next(&once, ARENA, Deadlines::of(30, 2), "").unwrap(),
            expect
        );
        assert_eq!(
            Handed::parse(&once),
            Handed {
                arena: Some(ARENA.address),
                init: Some("/bin/systemd".into()),
                deadlines: Deadlines {
                    application: 30,
                    all: 150
                },
            }
        );
        assert_eq!(Handed::parse("root=/dev/vda"), Handed::default());
    }

    #[test]
    fn appended_words_win_and_words_for_init_stay_last() {
        check(
            "root=/dev/vda init=/a -- single",
            "quiet init=/b",
            "root=/dev/vda quiet rw init=/usr/lib/tracker/early tracker.image=0x80000000 tracker.deadline=30,150 \
             tracker.init=/b -- single",
        );
    }

    #[test]
    fn a_fault_is_for_one_update() {
        let once = next("quiet", ARENA, Deadlines::default(), "TRACKER_FAULT=stage").unwrap();
        assert!(once.starts_with("quiet TRACKER_FAULT=stage rw "), "{once}");
        let twice = next(&once, ARENA, Deadlines::default(), "").unwrap();
        assert!(twice.starts_with("quiet rw "), "{twice}");
    }

    #[test]
    fn quotes_keep_blanks_together() {
        check(
            "dyndbg=\"file a +p; ro\" root=/dev/vda",
            "",
            "dyndbg=\"file a +p; ro\" root=/dev/vda rw init=/usr/lib/tracker/early \
             tracker.image=0x80000000 tracker.deadline=30,150",
        );
    }

    #[test]
    fn reservations_are_read_as_the_kernel_reads_them() {
        let range = |size, address| Reservation { address, size };
        assert_eq!(
            reservations("a memmap=960M!2G memmap=1G$3G,0x100000!0x180000000 -- memmap=1M!1M"),
            [range(960 << 20, 2 << 30), range(1 << 20, 0x1_8000_0000)]
        );
        assert_eq!(
            reservations("memmap=exactmap memmap=!1G memmap=99999999999G!1"),
            []
        );
    }

    #[test]
    fn a_line_the_kernel_would_cut_is_refused() {
        assert!(next(&"x".repeat(1900), ARENA, Deadlines::of(30, 2), "").is_ok());
        assert!(next(&"x".repeat(2048), ARENA, Deadlines::of(30, 2), "").is_err());
    }
}
