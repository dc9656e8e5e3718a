//! What host and guest say to each other over the virtio-serial port.
//!
//! One JSON object per line, each line preceded by a newline of its own: when
//! a kexec cuts a line short, the garbage ends where the next message starts
//! and no resynchronisation is needed. Binary data travels as hex digits.

use std::fmt::Write as _;

use serde::{Deserialize, Serialize};

/// Name of the virtio-serial port that carries the protocol.
pub const PORT_NAME: &str = "tracker.control";

/// Most bytes of file or output data in one message.
pub const CHUNK: usize = 256 * 1024;

/// Most bytes kept of each output stream of a command (its end is kept).
pub const OUTPUT_LIMIT: usize = 4 * 1024 * 1024;

/// A message from the host to the guest.
#[derive(Debug, Serialize, Deserialize)]
pub struct ToGuest {
    /// Returned in the reply.
    pub id: u64,
    /// What to do.
    pub request: Request,
}

/// A message from the guest to the host.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ToHost {
    /// `guestd` has started: after boot, and again after a kexec.
    Hello(Hello),
    /// The answer to the request with this id.
    Reply {
        /// The id of the request.
        id: u64,
        /// Its result.
        reply: Reply,
    },
}

/// What the guest says about itself when `guestd` starts.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// `/proc/sys/kernel/random/boot_id`: different after each boot or kexec.
    pub boot_id: String,
    /// Kernel release, as `uname -r`.
    pub release: String,
    /// Milliseconds from the start of the kernel to this message.
    pub uptime_ms: u64,
    /// Milliseconds from the start of the kernel to the start of `guestd`.
    pub init_ms: u64,
}

/// Something the guest is asked to do.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// Run a command to its end, standard input empty.
    Exec {
        /// Program and arguments.
        argv: Vec<String>,
        /// Variables added to the environment.
        env: Vec<(String, String)>,
        /// The process group is killed after this many milliseconds.
        timeout_ms: u64,
    },
    /// Start a command in a session of its own and leave it running.
    Spawn {
        /// Program and arguments.
        argv: Vec<String>,
        /// Variables added to the environment.
        env: Vec<(String, String)>,
        /// File that stdout and stderr are appended to, made with its
        /// directory if missing; `/dev/null` if none.
        log: Option<String>,
    },
    /// Wait for the end of a process that `Spawn` started.
    Wait {
        /// Its PID.
        pid: i32,
        /// Give up after this many milliseconds.
        timeout_ms: u64,
    },
    /// Wait until a file exists, or until it is gone.
    AwaitFile {
        /// Absolute path.
        path: String,
        /// Which of the two.
        exists: bool,
        /// Give up after this many milliseconds.
        timeout_ms: u64,
    },
    /// Send a signal.
    Kill {
        /// The PID, negative for a process group.
        pid: i32,
        /// Signal number.
        signal: i32,
    },
    /// Read a part of a file.
    Read {
        /// Absolute path.
        path: String,
        /// First byte.
        offset: u64,
    },
    /// Write a part of a file, creating it if it is missing.
    Write {
        /// Absolute path.
        path: String,
        /// Where the data goes; the file is cut off there first.
        offset: u64,
        /// Hex digits.
        data: String,
    },
    /// Set a file's mode and rename it into place.
    Install {
        /// Absolute path of the finished file.
        from: String,
        /// Its new name, on the same filesystem.
        to: String,
        /// Permission bits.
        mode: u32,
    },
    /// Answer with the hello message's content.
    Identify,
}

/// The result of a request.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reply {
    /// A command has ended.
    Exec {
        /// How.
        status: Status,
        /// Hex digits.
        stdout: String,
        /// Hex digits.
        stderr: String,
    },
    /// A command runs with this PID.
    Spawned {
        /// The PID.
        pid: i32,
    },
    /// The state of a process after `Wait`; none if it still runs.
    Waited {
        /// How it ended.
        status: Option<Status>,
    },
    /// Whether the file of `AwaitFile` came or went in time.
    Awaited(bool),
    /// A part of a file.
    Data {
        /// Hex digits.
        data: String,
        /// True if nothing follows.
        eof: bool,
    },
    /// Done, nothing to tell.
    Done,
    /// The guest's name for itself.
    Identity(Hello),
    /// It failed.
    Failed {
        /// Operation, object and reason.
        message: String,
    },
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// By exiting with this code.
    Exited(i32),
    /// By this signal.
    Signaled(i32),
    /// Killed because its time was up.
    TimedOut,
}

/// Frames a message: newline, JSON, newline.
///
/// # Errors
/// If the message cannot be expressed in JSON.
pub fn encode<T: Serialize>(message: &T) -> serde_json::Result<Vec<u8>> {
    let mut line = vec![b'\n'];
    serde_json::to_writer(&mut line, message)?;
    line.push(b'\n');
    Ok(line)
}

/// Two lower-case hex digits per byte.
pub fn to_hex(data: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let mut text = String::with_capacity(data.len() * 2);
    for byte in data {
        text.push(char::from(DIGITS[usize::from(byte >> 4)]));
        text.push(char::from(DIGITS[usize::from(byte & 15)]));
    }
    text
}

/// The bytes behind hex digits; none if the text is not such.
pub fn from_hex(text: &str) -> Option<Vec<u8>> {
    fn digit(c: u8) -> Option<u8> {
        match c {
            b'0'..=b'9' => Some(c - b'0'),
            b'a'..=b'f' => Some(c - b'a' + 10),
            _ => None,
        }
    }
    let pairs = text.as_bytes().chunks_exact(2);
    if !pairs.remainder().is_empty() {
        return None;
    }
    pairs
        .map(|pair| Some(digit(pair[0])? << 4 | digit(pair[1])?))
        .collect()
}

impl std::fmt::Display for Status {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Status::Exited(code) => write!(f, "exit code {code}"),
            Status::Signaled(signal) => write!(f, "signal {signal}"),
            Status::TimedOut => f.write_str("timed out"),
        }
    }
}

/// Quotes words for a POSIX shell.
pub fn shell_words<S: AsRef<str>>(words: impl IntoIterator<Item = S>) -> String {
    let mut line = String::new();
    for word in words {
        let word = word.as_ref();
        let plain = |c: char| c.is_ascii_alphanumeric() || "-_./=:,+@%".contains(c);
        let space = if line.is_empty() { "" } else { " " };
        // Writing to a String cannot fail.
        let _ = if !word.is_empty() && word.chars().all(plain) {
            write!(line, "{space}{word}")
        } else {
            write!(line, "{space}'{}'", word.replace('\'', r"'\''"))
        };
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hex_there_and_back() {
        let all: Vec<u8> = (0..=255).collect();
        assert_eq!(from_hex(&to_hex(&all)), Some(all));
        assert_eq!(from_hex("0"), None);
        assert_eq!(from_hex("0G"), None);
    }

    #[test]
    fn a_cut_message_does_not_spoil_the_next() {
        let first = encode(&ToGuest {
            id: 1,
            request: Request::Identify,
        })
        .unwrap();
        let second = encode(&ToGuest {
            id: 2,
            request: Request::Identify,
        })
        .unwrap();
        let wire = [&first[..first.len() / 2], &second].concat();
        let ids: Vec<u64> = wire
            .split(|&b| b == b'\n')
            .filter_map(|line| serde_json::from_slice::<ToGuest>(line).ok())
            .map(|message| message.id)
            .collect();
        assert_eq!(ids, [2]);
    }

    #[test]
    fn words_are_quoted_for_the_shell() {
        assert_eq!(shell_words(["a", "b c", "", "d'e"]), r"a 'b c' '' 'd'\''e'");
    }
}
