package org.mobilemm.demo

import android.app.ActivityManager
import android.content.Context
import android.content.Intent
import android.content.IntentFilter
import android.graphics.Bitmap
import android.os.BatteryManager
import android.os.Build
import android.os.Handler
import android.os.Looper
import android.util.Log
import org.mobilemm.Benchmark
import org.mobilemm.BenchmarkFolder
import org.mobilemm.BenchmarkSettings
import org.mobilemm.Bundle
import org.mobilemm.Device
import org.mobilemm.Figure
import org.mobilemm.MobileMMError
import org.mobilemm.Raster
import java.io.ByteArrayOutputStream
import java.io.File
import java.util.Random
import kotlin.math.abs

/** The benchmark that is under way, and the last one's result; of the main thread. */
class Benchmarks(private val context: Context, private val models: Models, private val chat: Chat) {
    private val main = Handler(Looper.getMainLooper())
    private val listeners = LinkedHashSet<() -> Unit>()

    @Volatile private var benchmark: Benchmark? = null

    var isRunning = false
        private set
    var status: String? = null
        private set
    var figures: List<Figure> = emptyList()
        private set
    var json: String? = null
        private set

    fun listen(listener: () -> Unit) = listeners.add(listener)

    fun unlisten(listener: () -> Unit) = listeners.remove(listener)

    fun cancel() {
        benchmark?.backend?.cancel()
    }

    /** Where a computer puts bundles, and looks for results. */
    val files get() = BenchmarkFolder(context.getExternalFilesDir(null) ?: context.filesDir)

    /**
     * Measures a bundle, with no other model in memory: the one of that name among [files], without a name the one in
     * use. `out` is a file's name there.
     */
    fun start(
        settings: BenchmarkSettings,
        out: String,
        bundle: String? = null,
    ) {
        if (isRunning) return
        isRunning = true
        figures = emptyList()
        chat.alone {
            val end =
                try {
                    measure(settings, out, bundle)
                } catch (error: MobileMMError) {
                    Log.e(TAG, "failed: ${error.message}")
                    error.message ?: ""
                }
            main.post {
                isRunning = false
                tell(end)
            }
        }
    }

    private fun measure(
        settings: BenchmarkSettings,
        out: String,
        name: String?,
    ): String {
        val device = Phone(context)
        val files = files
        val text =
            files.write(out) { report ->
                val measuring = Benchmark(if (name == null) inUse() else files.bundle(name), settings, device).also { benchmark = it }
                val result =
                    measuring.run { step ->
                        Log.i(TAG, "step: $step")
                        report(step)
                        main.post { tell(step) }
                    }
                val found = measuring.found
                main.post { figures = found }
                result
            }
        main.post { json = text }
        val path = File(files.folder, out).path
        Log.i(TAG, "done: $path")
        return context.getString(R.string.benchmark_done, device.name, path)
    }

    private fun inUse(): Bundle {
        if (models.hasPacked()) models.unpack()
        val name = models.chosen ?: throw MobileMMError(context.getString(R.string.no_model))
        return Bundle.open(models.library.folder(name))
    }

    private fun tell(text: String) {
        status = text
        listeners.toList().forEach { it() }
    }

    /** This device, for the benchmark. */
    private class Phone(private val context: Context) : Device {
        private val battery = context.getSystemService(Context.BATTERY_SERVICE) as BatteryManager
        override val name = "${Build.MANUFACTURER} ${Build.MODEL}"
        override val system = "Android ${Build.VERSION.RELEASE} (API ${Build.VERSION.SDK_INT}) ${Build.SUPPORTED_ABIS.firstOrNull() ?: ""}"
        override val processor = "$name, ${Build.HARDWARE} ${Build.BOARD}"
        override val memory =
            ActivityManager.MemoryInfo().also {
                (context.getSystemService(Context.ACTIVITY_SERVICE) as ActivityManager).getMemoryInfo(it)
            }.totalMem

        override fun decode(encoded: ByteArray): Raster = Pictures.decode(encoded)

        override fun photograph(seed: Int): ByteArray {
            val draw = Random(seed.toLong())
            val pixels =
                IntArray(WIDTH * HEIGHT) { index ->
                    val light = 200 * (index / WIDTH) / HEIGHT + 55 * (index % WIDTH) / WIDTH + draw.nextInt(24)
                    0xff shl 24 or minOf(light, 255) * 0x010101
                }
            val bitmap = Bitmap.createBitmap(pixels, WIDTH, HEIGHT, Bitmap.Config.ARGB_8888)
            return ByteArrayOutputStream().also { bitmap.compress(Bitmap.CompressFormat.JPEG, 90, it) }.toByteArray()
        }

        override fun power(): Double? {
            val state = batteryState() ?: return null
            if (state.getIntExtra(BatteryManager.EXTRA_PLUGGED, 0) != 0) return null
            val volts = state.getIntExtra(BatteryManager.EXTRA_VOLTAGE, 0) / 1000.0
            // Its sign is not the same on all phones; where it cannot be read it is 0 or the least of all numbers.
            val current = abs(battery.getIntProperty(BatteryManager.BATTERY_PROPERTY_CURRENT_NOW).toDouble())
            if (volts !in VOLTS || current == 0.0 || current > MOST_MICROAMPERES) return null
            // Some phones tell mA instead of µA; none computes on less than 10 mA.
            return volts * if (current < 10_000) current / 1e3 else current / 1e6
        }

        override fun celsius(): Map<String, Double> {
            val tenths = batteryState()?.getIntExtra(BatteryManager.EXTRA_TEMPERATURE, 0) ?: 0
            return if (tenths == 0) emptyMap() else mapOf("battery" to tenths / 10.0)
        }

        private fun batteryState() = context.registerReceiver(null, IntentFilter(Intent.ACTION_BATTERY_CHANGED))

        private companion object {
            const val WIDTH = 1280
            const val HEIGHT = 960
            val VOLTS = 2.5..15.0
            const val MOST_MICROAMPERES = 2e7
        }
    }

    companion object {
        const val TAG = "MobileMMBench"
    }
}
