// Some 50 threads that wait in all the ways a JVM's threads do, asked by HTTP and by lines.

import com.sun.net.httpserver.HttpServer;
import java.io.BufferedReader;
import java.io.IOException;
import java.io.InputStreamReader;
import java.io.PrintStream;
import java.net.InetAddress;
import java.net.InetSocketAddress;
import java.net.ServerSocket;
import java.net.Socket;
import java.util.ArrayList;
import java.util.HashMap;
import java.util.List;
import java.util.Map;
import java.util.concurrent.Executors;
import java.util.concurrent.Semaphore;
import java.util.concurrent.TimeUnit;
import java.util.concurrent.atomic.AtomicInteger;
import java.util.concurrent.atomic.AtomicIntegerArray;

public class Threads {
    static final int EACH = 8;
    static final InetAddress LOCAL = InetAddress.getLoopbackAddress();
    /** Counts the requests of all HTTP connections. */
    static final AtomicInteger requests = new AtomicInteger();
    /** How often each thread that waits for some time has woken up; the last is the timer's. */
    static final AtomicIntegerArray ticks = new AtomicIntegerArray(2 * EACH + 1);
    /** What parked threads wait for, and what they say when they have it. */
    static final Semaphore permits = new Semaphore(0);
    static final Semaphore released = new Semaphore(0);
    /** Something for the collector to move. */
    static final Map<String, List<byte[]>> kept = new HashMap<>();

    interface Body {
        void run() throws Exception;
    }

    static void start(String name, Body body) {
        new Thread(() -> {
            try {
                body.run();
            } catch (Exception error) {
                error.printStackTrace();
                System.exit(1);
            }
        }, name).start();
    }

    public static void main(String[] arguments) throws Exception {
        for (int number = 0; number < EACH; number++) {
            int sleeper = number, waiter = EACH + number;
            Object monitor = new Object();
            start("sleeps", () -> {
                while (true) {
                    Thread.sleep(200);
                    ticks.incrementAndGet(sleeper);
                }
            });
            start("waits", () -> {
                synchronized (monitor) {
                    while (true) {
                        monitor.wait(200);
                        ticks.incrementAndGet(waiter);
                    }
                }
            });
            start("parks", () -> {
                permits.acquire();
                released.release();
            });
        }
        Executors.newSingleThreadScheduledExecutor().scheduleAtFixedRate(
                () -> ticks.incrementAndGet(2 * EACH), 200, 200, TimeUnit.MILLISECONDS);
        for (int key = 0; key < 200; key++) {
            kept.computeIfAbsent("key " + key % 50, (any) -> new ArrayList<>()).add(filled(key));
        }

        ServerSocket listener = new ServerSocket(7100, 50, LOCAL);
        start("accepts", () -> {
            while (true) {
                Socket connection = listener.accept();
                start("reads", () -> serve(connection));
            }
        });
        HttpServer http = HttpServer.create(new InetSocketAddress(LOCAL, 7101), 50);
        http.setExecutor(Executors.newFixedThreadPool(2 * EACH));
        http.createContext("/", (exchange) -> {
            long count = requests.incrementAndGet();
            byte[] answer = (count + " " + count * count + "\n").getBytes();
            exchange.sendResponseHeaders(200, answer.length);
            exchange.getResponseBody().write(answer);
            exchange.close();
        });
        http.start();
        System.out.println("listening");
    }

    /** Answers each line of a connection with its number and what it asks for. */
    static void serve(Socket connection) throws IOException, InterruptedException {
        PrintStream out = new PrintStream(connection.getOutputStream(), true);
        var in = new BufferedReader(new InputStreamReader(connection.getInputStream()));
        int lines = 0;
        for (String line = in.readLine(); line != null; line = in.readLine()) {
            String[] words = line.split(" ");
            lines++;
            out.println(lines + " " + switch (words[0]) {
                case "threads" -> Thread.activeCount();
                case "ticks" -> ticks;
                case "wait" -> elapsed(Integer.parseInt(words[1]));
                case "release" -> {
                    permits.release(EACH);
                    yield released.tryAcquire(EACH, 60, TimeUnit.SECONDS);
                }
                case "collect" -> {
                    System.gc();
                    yield intact();
                }
                default -> line;
            });
        }
        connection.close();
    }

    /** Waits, and says for how many milliseconds by the monotonic clock. */
    static long elapsed(int milliseconds) throws InterruptedException {
        long begun = System.nanoTime();
        Thread.sleep(milliseconds);
        return (System.nanoTime() - begun) / 1_000_000;
    }

    static byte[] filled(int key) {
        byte[] bytes = new byte[10_000];
        for (int at = 0; at < bytes.length; at++) {
            bytes[at] = (byte) (key * 31 + at);
        }
        return bytes;
    }

    /** How many of the kept arrays are as they were made. */
    static int intact() {
        int count = 0;
        for (int key = 0; key < 200; key++) {
            byte[] found = kept.get("key " + key % 50).get(key / 50);
            count += java.util.Arrays.equals(found, filled(key)) ? 1 : 0;
        }
        return count;
    }
}
