//! A client inside the guest: asks redis for a PONG every millisecond and
//! tells how long it had to wait at worst.
//!
//! `heartbeat PORT DIR` creates `DIR/beating` after the first hundred answers
//! and ends when `DIR/stop` appears, leaving `DIR/gap` with the longest time
//! between two answers in microseconds. It tells what a frozen program looks
//! like from outside, whatever the tool that froze it reports.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [port, dir] = &arguments[..] else {
        bail!("Usage: heartbeat PORT DIR");
    };
    let dir = PathBuf::from(dir);
    let mut redis = TcpStream::connect(("127.0.0.1", port.parse()?)).context("Connect to redis")?;
    redis.set_nodelay(true)?;
    redis.set_read_timeout(Some(Duration::from_secs(300)))?;
    let stop = dir.join("stop");
    let (mut last, mut longest) = (Instant::now(), Duration::ZERO);
    for beat in 1u64.. {
        let mut pong = [0; 7];
        redis.write_all(b"PING\r\n").context("Ask redis")?;
        redis.read_exact(&mut pong).context("Hear from redis")?;
        ensure!(&pong == b"+PONG\r\n", "Redis said {pong:?}");
        let now = Instant::now();
        longest = longest.max(now - last);
        last = now;
        if beat == 100 {
            // The warming up does not count.
            longest = Duration::ZERO;
            fs::write(dir.join("beating"), "")?;
        }
        if beat % 16 == 0 && stop.exists() {
            break;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    fs::write(dir.join("gap"), longest.as_micros().to_string()).context("Write the result")
}
