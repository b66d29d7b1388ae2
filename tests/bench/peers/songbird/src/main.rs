//! songbird's driver in many guilds at once: one `Driver` per guild, all of them with the same Opus frames.
//!
//!     songbird-peer FRAMES THREADS PER_THREAD
//!
//! FRAMES is a file of Opus frames of 20 ms, each after its length (u16, big endian); THREADS are tokio's, PER_THREAD is
//! how many guilds a mixer thread may have. Voice credentials come as one line of JSON on standard input; the program
//! ends when that does. What it sends is passed through: packets of a lone track at full volume, if they are 20 ms of
//! Opus, are neither decoded nor mixed nor encoded.

use std::{
    env,
    error::Error,
    fs,
    io::{self, Read, Seek, SeekFrom},
    num::NonZeroUsize,
    process,
    sync::Arc,
};

use serde_json::Value;
use songbird::{
    driver::{Driver, Scheduler, SchedulerConfig, SchedulerMode},
    id::{ChannelId, GuildId, UserId},
    input::{core::io::MediaSource, AudioStream, Input, LiveInput},
    Config, ConnectionInfo,
};
use tokio::{
    io::{stdin, AsyncBufReadExt, AsyncReadExt, BufReader},
    sync::Semaphore,
    task::JoinSet,
};

const JOINS_AT_ONCE: usize = 8;
const DCA_METADATA: &str = r#"{"dca":{"version":1,"tool":{"name":"","version":""}},
"opus":{"mode":"music","sample_rate":48000,"frame_size":960,"vbr":true,"channels":2}}"#;

type Failure = Box<dyn Error + Send + Sync>;

/// A DCA file without end in memory: a header, and then the frames over and over. All guilds share the bytes.
#[derive(Clone)]
struct EndlessDca {
    bytes: Arc<[u8]>,
    header_bytes: usize,
    position: usize,
}

impl EndlessDca {
    fn new(frames: &[u8]) -> Self {
        let mut bytes = b"DCA1".to_vec();
        bytes.extend((DCA_METADATA.len() as u32).to_le_bytes());
        bytes.extend(DCA_METADATA.as_bytes());
        let header_bytes = bytes.len();
        let mut rest = frames;
        while let Some((&length, after)) = rest.split_first_chunk::<2>() {
            let length = u16::from_be_bytes(length);
            let (frame, after) = after.split_at(length.into());
            bytes.extend(length.to_le_bytes());
            bytes.extend(frame);
            rest = after;
        }
        Self {
            bytes: bytes.into(),
            header_bytes,
            position: 0,
        }
    }

    fn input(&self) -> Input {
        let stream = AudioStream {
            input: Box::new(self.clone()) as Box<dyn MediaSource>,
        };
        Input::Live(LiveInput::Raw(stream), None)
    }
}

impl Read for EndlessDca {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.position == self.bytes.len() {
            self.position = self.header_bytes;
        }
        let rest = &self.bytes[self.position..];
        let taken = rest.len().min(buffer.len());
        buffer[..taken].copy_from_slice(&rest[..taken]);
        self.position += taken;
        Ok(taken)
    }
}

impl Seek for EndlessDca {
    fn seek(&mut self, _: SeekFrom) -> io::Result<u64> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

impl MediaSource for EndlessDca {
    fn is_seekable(&self) -> bool {
        false
    }

    fn byte_len(&self) -> Option<u64> {
        None
    }
}

fn connection_info(voice: &Value) -> Result<ConnectionInfo, Failure> {
    let text = |name: &str| {
        voice[name]
            .as_str()
            .ok_or_else(|| format!("credentials without {name}"))
    };
    Ok(ConnectionInfo {
        channel_id: ChannelId(text("channel")?.parse()?),
        endpoint: text("endpoint")?.into(),
        guild_id: GuildId(text("guild")?.parse()?),
        session_id: text("session_id")?.into(),
        token: text("token")?.into(),
        user_id: UserId(text("user_id")?.parse()?),
    })
}

async fn run(programme: EndlessDca, per_thread: NonZeroUsize) -> Result<(), Failure> {
    let mut led_by = BufReader::new(stdin());
    let mut line = String::new();
    led_by.read_line(&mut line).await?;
    let voices: Vec<Value> = serde_json::from_str(&line)?;

    let mut placement = SchedulerConfig::default();
    placement.strategy = SchedulerMode::MaxPerThread(per_thread);
    let config = Config::default().scheduler(Scheduler::new(placement));
    let turns = Arc::new(Semaphore::new(JOINS_AT_ONCE));
    let mut joins = JoinSet::<Result<Driver, Failure>>::new();
    for voice in &voices {
        let info = connection_info(voice)?;
        let (turns, input, mut driver) = (
            turns.clone(),
            programme.input(),
            Driver::new(config.clone()),
        );
        joins.spawn(async move {
            let _turn = turns.acquire().await?;
            driver.connect(info).await?;
            driver.play_only_input(input);
            Ok(driver)
        });
    }
    let mut drivers = Vec::new();
    while let Some(joined) = joins.join_next().await {
        drivers.push(joined??);
    }
    println!("playing");
    led_by.read_to_string(&mut line).await?;
    Ok(())
}

fn main() -> Result<(), Failure> {
    let arguments: Vec<String> = env::args().collect();
    let [_, frames, threads, per_thread] = &arguments[..] else {
        return Err("usage: songbird-peer FRAMES THREADS PER_THREAD".into());
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(threads.parse()?)
        .enable_all()
        .build()?;
    runtime.block_on(run(
        EndlessDca::new(&fs::read(frames)?),
        per_thread.parse()?,
    ))?;
    process::exit(0) // without a farewell to every server
}
