"use strict";
// Values under the pointer (or under the arrow keys) of line charts and heat maps. The page is complete without it.
(function () {
  var tip = document.createElement("output");
  tip.className = "tip";
  tip.hidden = true;
  document.body.appendChild(tip);

  function figure(value) {
    var scales = [[1e12, " T"], [1e9, " B"], [1e6, " M"], [1e4, " k", 1e3]];
    for (var i = 0; i !== scales.length; i++) {
      if (Math.abs(value) >= scales[i][0]) { return +(value / (scales[i][2] || scales[i][0])).toPrecision(4) + scales[i][1]; }
    }
    return String(+value.toPrecision(4));
  }

  function pair(text) { return text.split(" ").map(Number); }

  // A line's points as [place from 0 to 1, value], read back from its path.
  function points(path, y, log) {
    var numbers = path.getAttribute("d").match(/-?[\d.]+/g) || [], result = [];
    for (var i = 0; i !== numbers.length - numbers.length % 2; i += 2) {
      var up = 1 - numbers[i + 1] / 1000;
      result.push([numbers[i] / 1000, log ? y[0] * Math.pow(y[1] / y[0], up) : y[0] + up * (y[1] - y[0])]);
    }
    return result;
  }

  function lineReader(svg) {
    var x = pair(svg.dataset.x), y = pair(svg.dataset.y), log = svg.dataset.log === "1";
    var lines = Array.from(svg.querySelectorAll("path.line:not(.faint)")).map(function (path) {
      return { name: path.dataset.name, points: points(path, y, log) };
    });
    return function (across) {
      var rows = [figure(x[0] + across * (x[1] - x[0])) + " " + svg.dataset.unit];
      lines.forEach(function (line) {
        if (!line.points.length) { return; }
        var near = line.points.reduce(function (best, point) { return Math.abs(point[0] - across) >= Math.abs(best[0] - across) ? best : point; });
        rows.push(line.name + ": " + figure(near[1]));
      });
      return rows.join("\n");
    };
  }

  function heatReader(svg) {
    var names = svg.dataset.rows.split("|"), rows = svg.dataset.values.split(";").map(function (row) { return row.split(" "); });
    return function (across, down) {
      var row = Math.min(rows.length - 1, Math.floor(down * rows.length));
      var column = Math.min(rows[row].length - 1, Math.floor(across * rows[row].length));
      var place = Number(svg.dataset.first) + column * Number(svg.dataset.width);
      var layer = isNaN(Number(names[row])) ? names[row] : "layer " + names[row];
      var where = svg.dataset.column === "expert" ? "expert " + place : figure(place) + " " + svg.dataset.column;
      return layer + ", " + where + "\n" + rows[row][column].replace(/^-$/, "none") + " " + svg.dataset.value;
    };
  }

  function show(text, left, top) {
    tip.textContent = text;
    tip.hidden = false;
    var box = tip.getBoundingClientRect();
    tip.style.left = Math.max(4, Math.min(left + 14, document.documentElement.clientWidth - box.width - 6)) + "px";
    tip.style.top = (top - box.height - 12 > 4 ? top - box.height - 12 : top + 18) + "px";
  }

  document.querySelectorAll(".plot").forEach(function (plot) {
    var svg = plot.querySelector("svg"), heat = svg.classList.contains("heat"), read = heat ? heatReader(svg) : lineReader(svg);
    var cursor = document.createElementNS(svg.namespaceURI, "line"), at = { across: 0.5, down: 0 };
    cursor.setAttribute("class", "cursor");
    cursor.setAttribute("y1", "0");
    cursor.setAttribute("y2", "100%");
    function hide() { tip.hidden = true; cursor.remove(); }
    function point(across, down, top) {
      var box = svg.getBoundingClientRect();
      at = { across: Math.max(0, Math.min(1, across)), down: Math.max(0, Math.min(0.9999, down)) };
      if (!heat) {
        cursor.setAttribute("x1", 100 * at.across + "%");
        cursor.setAttribute("x2", 100 * at.across + "%");
        svg.appendChild(cursor);
      }
      show(read(at.across, at.down), box.left + at.across * box.width, top);
    }
    function follow(event) {
      var box = svg.getBoundingClientRect();
      point((event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height, event.clientY);
    }
    plot.addEventListener("pointermove", follow);
    plot.addEventListener("pointerdown", follow);
    plot.addEventListener("pointerleave", hide);
    plot.addEventListener("blur", hide);
    plot.addEventListener("keydown", function (event) {
      var move = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
      if (event.key === "Escape") { hide(); }
      if (!move || (!heat ? move[1] : false)) { return; }
      event.preventDefault();
      var box = svg.getBoundingClientRect(), rows = heat ? svg.dataset.rows.split("|").length : 1;
      var columns = heat ? svg.dataset.values.split(";")[0].split(" ").length : 50;
      var down = at.down + move[1] / rows;
      point(at.across + move[0] / columns, down, box.top + down * box.height);
    });
  });
})();
