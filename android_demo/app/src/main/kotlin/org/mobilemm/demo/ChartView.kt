package org.mobilemm.demo

import android.content.Context
import android.graphics.Canvas
import android.graphics.Paint
import android.util.AttributeSet
import android.util.TypedValue
import android.view.View
import org.mobilemm.Figure
import java.util.Locale

/** A bar for each figure, those of one unit to one scale, each with its number. */
class ChartView(context: Context, attributes: AttributeSet?) : View(context, attributes) {
    private val density = resources.displayMetrics.density
    private val text = Paint(Paint.ANTI_ALIAS_FLAG).apply { textSize = TypedValue.applyDimension(TypedValue.COMPLEX_UNIT_SP, 14f, resources.displayMetrics) }
    private val bar = Paint(Paint.ANTI_ALIAS_FLAG).apply { color = context.getColor(R.color.accent) }
    private val back = Paint(Paint.ANTI_ALIAS_FLAG).apply { color = context.getColor(R.color.answer) }

    var figures: List<Figure> = emptyList()
        set(value) {
            field = value.filter { it.name != "token" && !it.name.startsWith("memory_") }
            contentDescription = context.getString(R.string.chart_description, field.joinToString { "${it.what}: ${number(it)}" })
            requestLayout()
            invalidate()
        }

    override fun onMeasure(
        widthMeasureSpec: Int,
        heightMeasureSpec: Int,
    ) = setMeasuredDimension(MeasureSpec.getSize(widthMeasureSpec), (figures.size * ROW * density).toInt())

    override fun onDraw(canvas: Canvas) {
        for ((index, figure) in figures.withIndex()) {
            val top = index * ROW * density
            val most = figures.filter { it.unit == figure.unit }.maxOf { it.median }
            text.color = context.getColor(R.color.text)
            text.textAlign = Paint.Align.LEFT
            canvas.drawText(figure.what, 0f, top + 16 * density, text)
            text.textAlign = Paint.Align.RIGHT
            canvas.drawText(number(figure), width.toFloat(), top + 16 * density, text)
            val line = top + 24 * density
            val round = 5 * density
            canvas.drawRoundRect(0f, line, width.toFloat(), line + 10 * density, round, round, back)
            val share = if (most > 0) (figure.median / most).toFloat() else 0f
            canvas.drawRoundRect(0f, line, maxOf(width * share, 2 * round), line + 10 * density, round, round, bar)
        }
    }

    private fun number(figure: Figure): String {
        val value = figure.median
        return when (figure.unit) {
            "s" -> if (value < 1) "%.0f ms".format(Locale.getDefault(), 1000 * value) else "%.2f s".format(Locale.getDefault(), value)
            "B" -> "%.0f MB".format(Locale.getDefault(), value / 1e6)
            else -> "%.1f %s".format(Locale.getDefault(), value, figure.unit)
        }
    }

    private companion object {
        /** Height of a figure's row in density-independent pixels. */
        const val ROW = 52
    }
}
