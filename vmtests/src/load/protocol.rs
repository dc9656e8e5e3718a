//! As much of the redis and memcached protocols as the clients speak.

use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};

/// Longest wait for one answer: a kernel update under emulation on a loaded
/// machine is a matter of minutes at worst.
const ANSWER: Duration = Duration::from_secs(600);

/// Longest wait for a server to come up.
const CONNECT: Duration = Duration::from_secs(60);

/// What a server speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// RESP.
    Redis,
    /// The text protocol.
    Memcached,
}

/// A connection to a server on the loopback device.
#[derive(Debug)]
pub struct Connection {
    protocol: Protocol,
    stream: BufReader<TcpStream>,
}

impl Connection {
    /// Connects, and waits until the server answers: a forwarded port accepts
    /// connections before the server behind it does.
    ///
    /// # Errors
    /// If the server does not answer within a minute.
    pub fn open(protocol: Protocol, port: u16) -> Result<Connection> {
        let begun = Instant::now();
        loop {
            match Connection::try_open(protocol, port) {
                Ok(connection) => return Ok(connection),
                Err(error) if begun.elapsed() > CONNECT => {
                    return Err(error.context(format!("Connect to {protocol:?} by port {port}")));
                }
                Err(_) => std::thread::sleep(Duration::from_millis(100)),
            }
        }
    }

    fn try_open(protocol: Protocol, port: u16) -> Result<Connection> {
        let stream = TcpStream::connect(("127.0.0.1", port))?;
        stream.set_read_timeout(Some(CONNECT))?;
        stream.set_nodelay(true)?;
        let mut connection = Connection {
            protocol,
            stream: BufReader::new(stream),
        };
        let hello: &[u8] = match protocol {
            Protocol::Redis => b"PING\r\n",
            Protocol::Memcached => b"version\r\n",
        };
        connection.send(hello)?;
        let answer = connection.line()?;
        ensure!(
            answer == "+PONG" || answer.starts_with("VERSION"),
            "The server greets with {answer:?}"
        );
        connection.stream.get_ref().set_read_timeout(Some(ANSWER))?;
        Ok(connection)
    }

    /// Stores a value; false if the server refuses.
    ///
    /// # Errors
    /// If the connection is lost.
    pub fn set(&mut self, key: &str, value: &[u8]) -> Result<bool> {
        match self.protocol {
            Protocol::Redis => {
                self.command(&[b"SET", key.as_bytes(), value])?;
                Ok(self.line()? == "+OK")
            }
            Protocol::Memcached => {
                let mut request = format!("set {key} 0 0 {}\r\n", value.len()).into_bytes();
                request.extend_from_slice(value);
                request.extend_from_slice(b"\r\n");
                self.send(&request)?;
                Ok(self.line()? == "STORED")
            }
        }
    }

    /// Reads a value, none if there is none.
    ///
    /// # Errors
    /// If the connection is lost or the answer is not one.
    pub fn get(&mut self, key: &str) -> Result<Option<Vec<u8>>> {
        match self.protocol {
            Protocol::Redis => {
                self.command(&[b"GET", key.as_bytes()])?;
                let head = self.line()?;
                let length = head
                    .strip_prefix('$')
                    .and_then(|digits| digits.parse::<i64>().ok());
                match length {
                    Some(-1) => Ok(None),
                    Some(length) => Ok(Some(self.data(usize::try_from(length)?)?)),
                    None => bail!("GET answered {head:?}"),
                }
            }
            Protocol::Memcached => {
                self.send(format!("get {key}\r\n").as_bytes())?;
                let head = self.line()?;
                if head == "END" {
                    return Ok(None);
                }
                let words: Vec<&str> = head.split(' ').collect();
                let ["VALUE", name, "0", length] = words[..] else {
                    bail!("get answered {head:?}");
                };
                ensure!(name == key, "get of {key} answered with {name}");
                let data = self.data(length.parse()?)?;
                let end = self.line()?;
                ensure!(end == "END", "get ended with {end:?}");
                Ok(Some(data))
            }
        }
    }

    /// One redis command and the line of its answer.
    ///
    /// # Errors
    /// If the connection is lost.
    pub fn call(&mut self, words: &[&[u8]]) -> Result<String> {
        self.command(words)?;
        self.line()
    }

    fn command(&mut self, words: &[&[u8]]) -> Result<()> {
        let mut request = format!("*{}\r\n", words.len()).into_bytes();
        for word in words {
            request.extend_from_slice(format!("${}\r\n", word.len()).as_bytes());
            request.extend_from_slice(word);
            request.extend_from_slice(b"\r\n");
        }
        self.send(&request)
    }

    fn send(&mut self, request: &[u8]) -> Result<()> {
        self.stream
            .get_mut()
            .write_all(request)
            .map_err(|error| lost(&error))
    }

    fn line(&mut self) -> Result<String> {
        let mut line = Vec::new();
        let length = self
            .stream
            .read_until(b'\n', &mut line)
            .map_err(|error| lost(&error))?;
        ensure!(length > 0, "The server closed the connection");
        let text = line.strip_suffix(b"\r\n").context("An answer is cut off")?;
        Ok(String::from_utf8_lossy(text).into_owned())
    }

    /// That many bytes and a line end.
    fn data(&mut self, length: usize) -> Result<Vec<u8>> {
        let mut data = vec![0; length + 2];
        self.stream
            .read_exact(&mut data)
            .map_err(|error| lost(&error))?;
        ensure!(data.ends_with(b"\r\n"), "A value is longer than announced");
        data.truncate(length);
        Ok(data)
    }
}

/// Names the way in which a connection was lost.
fn lost(error: &std::io::Error) -> anyhow::Error {
    match error.kind() {
        ErrorKind::WouldBlock | ErrorKind::TimedOut => anyhow!("No answer within {ANSWER:?}"),
        ErrorKind::ConnectionReset => anyhow!("Connection reset"),
        ErrorKind::UnexpectedEof => anyhow!("The server closed the connection"),
        _ => anyhow!("{error}"),
    }
}
