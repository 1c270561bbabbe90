package org.mobilemm

import java.io.File
import java.security.MessageDigest
import java.util.Locale
import java.util.Random
import java.util.concurrent.Executors
import java.util.concurrent.TimeUnit

/** How it is measured; the keys of `mobilemm bench`'s settings. `threads` 0: what the runtime takes by itself. */
data class BenchmarkSettings(
    val promptTokens: Int = 144,
    val newTokens: Int = 64,
    val images: Int = 1,
    val runs: Int = 5,
    val threads: Int = 0,
) {
    companion object {
        /** From extras of those names, null where there is none; each at most what a phone can do. */
        fun of(extra: (name: String) -> Int?): BenchmarkSettings {
            val default = BenchmarkSettings()
            return BenchmarkSettings(
                promptTokens = (extra("prompt_tokens") ?: default.promptTokens).coerceIn(1, 4096),
                newTokens = (extra("new_tokens") ?: default.newTokens).coerceIn(2, 4096),
                images = (extra("images") ?: default.images).coerceIn(0, 8),
                runs = (extra("runs") ?: default.runs).coerceIn(1, 100),
                threads = (extra("threads") ?: default.threads).coerceIn(0, 64),
            )
        }
    }
}

/** One thing measured, in the words of `mobilemm bench`: `pp144` reads 144 tokens, `tg64` writes 64. */
class Figure(val name: String, val what: String, val unit: String, val runs: List<Double>) {
    /** Half of the runs were above it. */
    val median: Double get() = runs.sorted().let { (it[(it.size - 1) / 2] + it[it.size / 2]) / 2 }
}

/** What the platform knows of a device: its name, its system, and how it decodes a picture. */
interface Device {
    val name: String
    val system: String
    val processor: String
    val memory: Long

    /** Encoded bytes → pixels. */
    fun decode(encoded: ByteArray): Raster

    /** A photograph's bytes, another one for each seed. */
    fun photograph(seed: Int): ByteArray

    /** Watts that its battery gives at this moment; null where that cannot be read, or the battery is charged. */
    fun power(): Double?

    /** Temperatures in °C, beside those that the system's files tell. */
    fun celsius(): Map<String, Double>
}

/**
 * Measures a bundle on this device: the figures of `mobilemm bench`, in its schema (`result_v1.schema.json`).
 *
 * Raises [Cancelled] when the backend is cancelled.
 */
class Benchmark(private val bundle: Bundle, private val settings: BenchmarkSettings, private val device: Device) {
    private val manifest = bundle.manifest
    private val figures = ArrayList<Figure>()
    private val peaks = LinkedHashMap<String, Long>()

    /** Of what is measured now, so that it can be stopped. */
    @Volatile var backend: Backend? = null
        private set

    /** All figures; `report` hears what is being measured. */
    fun run(report: (String) -> Unit = {}): Map<String, Any?> {
        report("measuring the device")
        val bandwidth = bandwidth()
        val operations = operations()
        val before = condition()
        Backend.open(bundle, settings.threads).use { backend ->
            this.backend = backend
            report("loading")
            val decoder = load(backend)
            decoder.use {
                if (manifest.image != null && settings.images > 0) {
                    report("looking at photographs")
                    pictures(backend)
                }
                report("reading a prompt")
                phase("prefill") { prefill(backend, decoder) }
                report("writing")
                phase("decode") { decode(backend, decoder) }
            }
            manifest.generation?.let {
                report("drawing")
                phase("drawing") { draw(PictureGenerator(bundle, backend, it)) }
            }
            return result(backend.runtime, bandwidth, operations, before)
        }
    }

    private fun load(backend: Backend): Decoder {
        val begun = System.nanoTime()
        lateinit var decoder: Decoder
        phase("load") {
            manifest.parts.keys.filter { it != "decoder" }.forEach(backend::load)
            decoder = backend.decoder()
        }
        tell("load_warm", "load, files in memory", "s", listOf(secondsSince(begun)))
        return decoder
    }

    private fun pictures(backend: Backend) {
        val rule = manifest.image!!
        val processor = ImageProcessor(rule)
        val photos = List(settings.runs + 1) { device.photograph(it) }
        val pixels = ArrayList<Tensor>()
        phase("image") {
            repeated("image", "photo: decode and resize") { index ->
                val tensor = Tensor.of("uint8", 1, 3, rule.height.toLong(), rule.width.toLong())
                tensor.view().put(processor.toPixels(device.decode(photos[index])))
                pixels += tensor
            }
        }
        phase("vision") {
            repeated("vision", "photo: encoder and projector") { backend.run("vision", mapOf("pixels" to pixels[it])) }
        }
        val others = List((settings.runs + 1) * settings.images) { device.photograph(1000 + it) }
        phase("ttft") {
            Session(bundle, backend, Sampling(maxNewTokens = 1)).use { session ->
                repeated("ttft", "photo's bytes to first token") { index ->
                    session.reset()
                    repeat(settings.images) { session.lookAt(device.decode(others[index * settings.images + it])) }
                    session.reply(QUESTION)
                }
            }
        }
    }

    /** What a picture takes does not depend on what it shows. Steps that are one program share its time alike. */
    private fun draw(generator: PictureGenerator) {
        val steps = ArrayList<Double>()
        val seconds =
            times { index ->
                val seed = index.toULong()
                if (!generator.isStepwise) {
                    generator.draw(generator.signals(), seed)
                } else {
                    val condition = generator.condition(generator.signals())
                    var begun = System.nanoTime()
                    val latents =
                        generator.latents(condition, seed) { _, _ ->
                            // The first run warms up.
                            if (index > 0) steps += secondsSince(begun)
                            begun = System.nanoTime()
                        }
                    generator.decode(latents)
                }
            }
        if (!generator.isStepwise) steps += seconds.map { it / generator.steps }
        tell("draw", "draw a picture", "s", seconds)
        tell("draw_step", "draw: one step", "s", steps)
    }

    private fun prefill(
        backend: Backend,
        decoder: Decoder,
    ) {
        val ids = ids()
        val seconds =
            times {
                decoder.truncate(0)
                decoder.decode(embed(backend, ids), null)
            }
        tell("pp${settings.promptTokens}", "read a prompt", "tok/s", seconds.map { settings.promptTokens / it })
    }

    /** Behind the prompt: embedding, step and greedy choice of each token. */
    private fun decode(
        backend: Backend,
        decoder: Decoder,
    ) {
        val ids = ids()
        val each = ArrayList<Double>()
        val rates = ArrayList<Double>()
        val energy = ArrayList<Double>()
        val size = manifest.model.vocabSize
        for (turn in 0..settings.runs) {
            decoder.truncate(0)
            var token = Sampler.largest(size, decoder.decode(embed(backend, ids), null)::get)
            val joules =
                joules {
                    val begun = System.nanoTime()
                    var last = begun
                    repeat(settings.newTokens) {
                        token = Sampler.largest(size, decoder.decode(embed(backend, listOf(token)), null)::get)
                        val now = System.nanoTime()
                        // The first run warms up.
                        if (turn > 0) each += (now - last) / 1e9
                        last = now
                    }
                    if (turn > 0) rates += settings.newTokens / ((last - begun) / 1e9)
                }
            if (turn > 0 && joules != null) energy += joules / settings.newTokens
        }
        tell("tg${settings.newTokens}", "write", "tok/s", rates)
        tell("token", "write one token", "s", each)
        if (energy.isNotEmpty()) tell("energy", "energy of one token, the whole device", "J", energy)
    }

    /** What the battery gives while `action` runs, by its power at many moments; null where that is not known. */
    private fun joules(action: () -> Unit): Double? {
        val first = device.power()
        if (first == null) {
            action()
            return null
        }
        val watts = arrayListOf(first)
        val meter = Executors.newSingleThreadScheduledExecutor()
        val seconds: Double
        try {
            meter.scheduleAtFixedRate({ device.power()?.let(watts::add) }, POWER_INTERVAL, POWER_INTERVAL, TimeUnit.MILLISECONDS)
            val begun = System.nanoTime()
            action()
            seconds = secondsSince(begun)
        } finally {
            meter.shutdown()
            meter.awaitTermination(1, TimeUnit.SECONDS)
        }
        return watts.average() * seconds
    }

    private fun ids(): List<Int> {
        val draw = Random(0)
        val special = manifest.model.eosTokenIds + manifest.model.imageTokenId
        return generateSequence { draw.nextInt(manifest.model.vocabSize) }.filter { it !in special }.take(settings.promptTokens).toList()
    }

    private fun embed(
        backend: Backend,
        ids: List<Int>,
    ): Tensor {
        val none = Tensor.of("float32", 0, manifest.model.hiddenSize.toLong())
        return backend.run("embed", mapOf("input_ids" to Tensor.ofIds(ids), "image_features" to none)).getValue("inputs_embeds")
    }

    private fun repeated(
        name: String,
        what: String,
        action: (Int) -> Unit,
    ) = tell(name, what, "s", times(action))

    /** Seconds of each run; one more before them warms up. */
    private fun times(action: (Int) -> Unit): List<Double> =
        List(settings.runs + 1) { index ->
            val begun = System.nanoTime()
            action(index)
            secondsSince(begun)
        }.drop(1)

    private fun tell(
        name: String,
        what: String,
        unit: String,
        runs: List<Double>,
    ) {
        figures += Figure(name, what, unit, runs)
    }

    private fun phase(
        name: String,
        action: () -> Unit,
    ) {
        val known = runCatching { File("/proc/self/clear_refs").writeText("5") }.isSuccess
        action()
        if (known) peak()?.let { peaks[name] = it }
    }

    private fun peak(): Long? =
        runCatching { File("/proc/self/status").readLines() }.getOrNull()
            ?.firstOrNull { it.startsWith("VmHWM:") }
            ?.let { 1024 * it.filter(Char::isDigit).toLong() }

    private fun result(
        runtime: String,
        bandwidth: Double,
        operations: Double,
        before: Map<String, Any?>,
    ): Map<String, Any?> {
        for ((phase, bytes) in peaks) tell("memory_$phase", "peak memory: $phase", "B", listOf(bytes.toDouble()))
        peaks.values.maxOrNull()?.let { tell("memory", "peak memory of the process", "B", listOf(it.toDouble())) }
        val absent = linkedMapOf("load_cold" to "this system cannot be asked to forget files")
        if (figures.none { it.name == "energy" }) absent["energy"] = "the battery is being charged, or does not tell its current"
        if (peaks.isEmpty()) absent["memory"] = "this system does not count a process' peak"
        if ("vision" in manifest.parts) absent["projector"] = "it is part of the vision program"
        val digest = MessageDigest.getInstance("SHA-256").digest(File(bundle.folder, Bundle.MANIFEST).readBytes())
        return mapOf(
            "schema_version" to 1,
            "mobilemm" to VERSION,
            "created" to utc(),
            "device" to device.name,
            "runtime" to runtime,
            "machine" to
                mapOf(
                    "system" to device.system,
                    "processor" to device.processor,
                    "cores" to Runtime.getRuntime().availableProcessors(),
                    "memory" to device.memory,
                    "bandwidth" to bandwidth,
                    "operations" to operations,
                    "before" to before,
                    "after" to condition(),
                ),
            "bundle" to
                mapOf(
                    "name" to manifest.model.name,
                    "target" to manifest.target,
                    "digest" to Bundle.hex(digest),
                    "bytes" to manifest.files.sumOf { it.bytes },
                    "parts" to manifest.parts.mapValues { it.value.bytes },
                    "bits" to manifest.parts.mapValues { it.value.quantization.bits },
                ),
            "settings" to
                mapOf(
                    "prompt_tokens" to settings.promptTokens,
                    "new_tokens" to settings.newTokens,
                    "images" to settings.images,
                    "runs" to settings.runs,
                    "threads" to settings.threads.takeIf { it > 0 },
                ),
            "figures" to figures.map { mapOf("name" to it.name, "what" to it.what, "unit" to it.unit, "runs" to it.runs) },
            "absent" to absent,
        )
    }

    /** Clocks in MHz and temperatures in °C, as far as the system tells. */
    private fun condition(): Map<String, Any?> {
        fun number(file: File) = runCatching { file.readText().trim().toDouble() }.getOrNull()
        val clocks =
            (File("/sys/devices/system/cpu").listFiles() ?: emptyArray())
                .filter { Regex("cpu[0-9]+").matches(it.name) }
                .sortedBy { it.name.drop(3).toInt() }
                .mapNotNull { number(File(it, "cpufreq/scaling_cur_freq"))?.div(1000) }
        val zones =
            (File("/sys/class/thermal").listFiles() ?: emptyArray()).filter { it.name.startsWith("thermal_zone") }.mapNotNull { zone ->
                val degrees = number(File(zone, "temp")) ?: return@mapNotNull null
                val name = runCatching { File(zone, "type").readText().trim() }.getOrNull()
                (if (name.isNullOrEmpty()) zone.name else name) to degrees / 1000
            }
        return mapOf("clock_mhz" to clocks, "celsius" to zones.toMap() + device.celsius(), "load" to null)
    }

    /** What was measured, for a chart. */
    val found: List<Figure> get() = figures

    private fun utc(): String {
        val format = java.text.SimpleDateFormat("yyyy-MM-dd'T'HH:mm:ss'+00:00'", Locale.ROOT)
        format.timeZone = java.util.TimeZone.getTimeZone("UTC")
        return format.format(java.util.Date())
    }

    companion object {
        const val VERSION = "0.1.0"
        const val QUESTION = "What is in this picture?"
        private const val ROUNDS = 5

        /** Milliseconds between two looks at the battery: its gauge is not read much more often. */
        private const val POWER_INTERVAL = 250L
        private const val LONGS = 1 shl 23
        private const val PRODUCTS = 1 shl 24

        private fun <T> together(action: () -> T): List<T> {
            val threads = Runtime.getRuntime().availableProcessors()
            val pool = Executors.newFixedThreadPool(threads)
            try {
                return pool.invokeAll(List(threads) { java.util.concurrent.Callable { action() } }).map { it.get() }
            } finally {
                pool.shutdown()
            }
        }

        @Volatile private var sink = 0.0

        /** Bytes a second that all cores read from memory together, the best of some rounds. */
        private fun bandwidth(): Double {
            val values = LongArray(LONGS) { it.toLong() }
            var best = 0.0
            repeat(ROUNDS) {
                val begun = System.nanoTime()
                val sums = together { var sum = 0L; for (value in values) sum += value; sum }
                best = maxOf(best, sums.size * 8.0 * LONGS / secondsSince(begun))
                sink = sums.sum().toDouble()
            }
            return best
        }

        /** Multiplications and additions a second in float32 as compiled code does them, of all cores together. */
        private fun operations(): Double {
            var best = 0.0
            repeat(ROUNDS) {
                val begun = System.nanoTime()
                val sums = together {
                    val lanes = FloatArray(16) { it.toFloat() }
                    for (step in 0 until PRODUCTS / 16) for (lane in lanes.indices) lanes[lane] = lanes[lane] * 0.5f + 1f
                    lanes.sum()
                }
                best = maxOf(best, sums.size * 2.0 * PRODUCTS / secondsSince(begun))
                sink = sums.sum().toDouble()
            }
            return best
        }
    }
}
